"""HTML pages that need nothing beside them: what the reports share. Their look is in page.html.jinja."""

from typing import Any, NamedTuple


class Headline(NamedTuple):
    """One figure of a report."""

    name: str
    value: str
    note: str = ""


def render(template: str, **values: Any) -> str:
    """One HTML file that needs nothing beside it; the same arguments give the same text.

    ``template``: its path inside this package. Text in ``values`` is escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("recgpt", ""),
        autoescape=True,  # names come from the data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, setting=_setting)
    html = environment.get_template(template).render(**values)
    # File names need not be UTF-8; Python keeps their other bytes as surrogates, which no file can hold.
    return html.encode("utf-8", "replace").decode("utf-8")


def percent(share: float) -> str:
    """Never 0.0% or 100.0% for what is only close to it."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}"


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
