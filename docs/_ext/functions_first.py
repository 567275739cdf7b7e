"""The directive `api`: a package's docstring, then what it exports: functions, classes, constants, in this order."""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from docstrings import convert
from docutils import nodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective


class Api(SphinxDirective):
    """`.. api:: unvanish.flow`. `:without:` names what the page documents itself; the content is directives for
    what comes from elsewhere, and goes between the package's own functions and its classes."""

    required_arguments = 1
    has_content = True
    option_spec = {"without": str.split}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Autodoc's own directives, in our order."""
        name = self.arguments[0]
        package = import_module(name)
        without = self.options.get("without", ())
        exported = {e: getattr(package, e) for e in package.__all__ if e not in without}
        functions = [e for e, value in exported.items() if inspect.isfunction(value)]
        classes = [e for e, value in exported.items() if inspect.isclass(value)]
        others = [e for e in exported if e not in functions + classes and not inspect.ismodule(exported[e])]
        lines = [f".. automodule:: {name}", "   :no-members:", ""]
        lines += _directives("autofunction", name, functions)
        lines += [*self.content, ""]
        lines += _directives("autoclass", name, classes)
        for e in others:
            lines += [f".. py:data:: {e}", f"   :module: {name}", ""]
            lines += [*("   " + line for line in convert(_comment(package, e))), ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def _directives(directive: str, package: str, names: list[str]) -> list[str]:
    return [line for name in names for line in (f".. {directive}:: {package}.{name}", "")]


def _comment(package: ModuleType, name: str) -> list[str]:
    """The string below a constant, in whichever module of the package defines it."""
    for module in [m for m in sys.modules if m == package.__name__ or m.startswith(package.__name__ + ".")]:
        found = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", name))
        if found:
            return found
    raise LookupError(f"{package.__name__}.{name} has no docstring below it")


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("api", Api)
    return {"parallel_read_safe": True}
