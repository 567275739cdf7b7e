"""Why a model does not learn, proved by exact tests and by interventions on copies, and what to change.

Belongs here: causes, their proofs, the plan, and its verification; all on copies.
Does not: cures themselves (`cures`), and what is only a measurement (`flow`).

`uv.diagnose` is the function; this package holds it, its findings and its records.
"""

from unvanish.diagnosis.diagnose import diagnose
from unvanish.diagnosis.finding import Finding
from unvanish.diagnosis.plan import Plan
from unvanish.diagnosis.results import Diagnosis, LayerDiagnosis, Prescription, Verification
from unvanish.diagnosis.verdict import Verdict

__all__ = ["Diagnosis", "Finding", "LayerDiagnosis", "Plan", "Prescription", "Verdict", "Verification", "diagnose"]
