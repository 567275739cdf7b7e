"""What the package needs and can use, and what of it is installed."""

import re

DEVELOPMENT = ("dev", "docs", "benchmarks", "real")


def installed() -> dict[str, str]:
    """Distribution → its version, or how to get it; without what only development needs."""
    from importlib import metadata  # a tenth of the time that `unvanish --help` takes

    found: dict[str, str] = {}
    for requirement in metadata.requires("unvanish") or ():
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)", requirement)
        if (extra is not None and extra[1] in DEVELOPMENT) or name == "unvanish":  # an extra that contains others
            continue
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            part = "unvanish" if extra is None else f"unvanish[{extra[1]}]"
            found[name] = f"not installed; pip install '{part}'"
    return found
