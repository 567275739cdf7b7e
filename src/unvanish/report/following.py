"""The folder of a running training: the records of a `stream=` folder, and the figures of a log.

Nothing here waits for the trainer or writes to its folder. A file that is only half written is read once it is
complete.
"""

import csv
import io
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from unvanish.flow.record import Flow, LayerFlow
from unvanish.flow.stream import SUFFIX

LOG = "metrics.csv"
"""the file that Lightning's CSVLogger writes, `unvanish train`'s own logger by default"""
CELLS = 80
"""the most cells of a layer's strip"""
KEPT = 240
"""the most records shown; if there are more, an even selection"""


class Following:
    """A folder that may grow: `state` returns its current content.

    Raises:
        NotADirectoryError: there is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotADirectoryError(f"FOLDER: expected a folder, got {self.folder}")
        self._seen: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def state(self) -> dict[str, Any]:
        """Everything that the page shows, as plain data."""
        files = sorted(self.folder.glob(f"*{SUFFIX}"))
        chosen = files if len(files) <= KEPT else [files[round(i * (len(files) - 1) / (KEPT - 1))] for i in range(KEPT)]
        records = [found for file in chosen if (found := self._record(file)) is not None]
        log, figures = newest(self.folder), {}
        if log is not None:
            figures = read_log(log)
        changed = max((_changed(path) for path in [*files[-1:], *([log] if log else [])]), default=None)
        return {
            "folder": self.folder.name,
            "records": records,
            "waiting": len(chosen) - len(records),
            "figures": figures,
            "warnings": warnings(records, figures),
            "idle": None if changed is None else max(0.0, time.time() - changed),
        }

    def _record(self, file: Path) -> dict[str, Any] | None:
        """A file's summary; None while it can't be read."""
        try:
            stat = file.stat()
            key = (stat.st_size, stat.st_mtime_ns)
            if file not in self._seen or self._seen[file][0] != key:
                self._seen[file] = (key, summary(Flow.load(file)))
        except (OSError, ValueError):
            return None
        return self._seen[file][1]


def summary(flow: Flow) -> dict[str, Any]:
    """Step and layers of one record, small enough to be sent again and again."""
    layers = {name: _layer(layer) for name, layer in flow.layers.items()}
    return {"step": max((layer.step for layer in flow.layers.values()), default=0), "layers": layers}


def _layer(layer: LayerFlow) -> dict[str, Any]:
    norms = layer.dh if layer.dc is None else layer.dc
    middle = norms.nanmedian(1).values
    T, top = len(middle), float(middle.max()) if len(middle) else 0.0
    places = list(range(T)) if T <= CELLS else [round(i * (T - 1) / (CELLS - 1)) for i in range(CELLS)]
    powers = (middle / top).log10() if top > 0 and math.isfinite(top) else torch.full((T,), -math.inf)
    above = int((middle > 0.01 * top).sum()) if top > 0 else 0
    return {
        "steps": T,
        "reverse": layer.name.endswith(".reverse"),
        "strip": [round(v, 2) if math.isfinite(v) else None for v in powers[places].tolist()],
        "above": above,
        "memory": _memory(layer),
        "problem": layer.problem,
    }


def _memory(layer: LayerFlow) -> float | None:
    """Half-life in steps of the slowest tenth of units along the carry; None where nothing carries."""
    if layer.log_carry is None:
        return None
    kept = float(layer.log_carry.sort().values[int(0.9 * (len(layer.log_carry) - 1))])
    return math.log(2) / -kept if kept < 0 and math.isfinite(kept) else None


def newest(folder: Path) -> Path | None:
    """The most recently changed log, in the folder or up to two levels below: a resumed training has several."""
    found = [path for depth in ("", "*/", "*/*/") for path in folder.glob(depth + LOG)]
    return max(found, key=_changed, default=None)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def read_log(path: Path) -> dict[str, list[list[float]]]:
    """Column → [[step, value], …]; a line that is not complete yet is left out.

    Figures that are not finite are left out too, since JSON can't represent them.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        try:
            step = float(row.get("step") or "nan")
        except ValueError:
            continue
        for name, written in row.items():
            if name in (None, "step", "epoch") or not isinstance(written, str) or not math.isfinite(step):
                continue
            try:
                value = float(written)
            except ValueError:
                continue
            if math.isfinite(value):
                found.setdefault(name, []).append([step, value])
    return found


def warnings(records: list[dict[str, Any]], figures: dict[str, list[list[float]]]) -> list[str]:
    """Notes for the reader of the page, in sentences."""
    said = []
    for name, layer in (records[-1]["layers"] if records else {}).items():
        if layer["problem"]:
            said.append(f"{name}: the record is not valid: {layer['problem']}")
    losses = [value for _, value in figures.get("train_loss", [])]
    stuck = len(losses) >= 20 and min(losses[-5:]) > 0.95 * max(losses[:5])
    short = [name for name, points in figures.items() if name.endswith("/reach") and points and points[-1][1] < 10]
    if stuck and short:
        reach = figures[short[0]][-1][1]
        layer = short[0].removeprefix("gradient_flow/").removesuffix("/reach")
        said.append(
            f"The loss has not fallen ({losses[0]:.3g} → {losses[-1]:.3g}), and the gradient at {layer} has "
            f"reach {reach:.0f}; uv.diagnose finds out whether that is the reason."
        )
    return said
