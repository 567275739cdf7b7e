"""The directive `api`: a package's docstring, then what it exports, functions before classes."""

import inspect
from importlib import import_module
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class Api(SphinxDirective):
    """`.. api:: unvanish.flow`; `:without:` has the names that the page documents by itself."""

    required_arguments = 1
    option_spec = {"without": str.split}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Autodoc's own directives, in our order."""
        name = self.arguments[0]
        package = import_module(name)
        exported = [(e, getattr(package, e)) for e in package.__all__]
        exported = [(e, value) for e, value in exported if not inspect.ismodule(value)]
        exported = [(e, value) for e, value in exported if e not in self.options.get("without", ())]
        functions = [e for e, value in exported if inspect.isfunction(value)]
        classes = [e for e, value in exported if inspect.isclass(value)]
        lines = [f".. automodule:: {name}", "   :no-members:", ""]
        for directive, names in (("autofunction", functions), ("autoclass", classes)):
            for exported_name in names:
                lines += [f".. {directive}:: {name}.{exported_name}", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Any) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("api", Api)
    return {"parallel_read_safe": True}
