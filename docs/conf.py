"""Configuration of the book; also writes one page per method, made from its spec."""

from pathlib import Path

from phosphene import methods
from phosphene.options import bounds_text, default_text, kind_text, parameter_schemas
from phosphene.spec import Invariant

project = "Phosphene"
copyright = "the Phosphene authors"
extensions = ["myst_parser", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Phosphene"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3


def method_page(name: str) -> str:
    """One method's page: what it does, its inputs and parameters, promises, cost and sources."""
    spec = methods[name].spec
    lines = [f"# {spec.title}", "", f"`{spec.name}` returns `{spec.returns}`.", "", spec.summary, ""]
    if spec.description:
        lines += ["```text", spec.description, "```", ""]
    lines += ["## Inputs", "", "| name | role | |", "| --- | --- | --- |"]
    lines += [f"| `{i.name}` | {i.role} | {'' if i.required else 'may be left out'} |" for i in spec.inputs]
    parameters = parameter_schemas(spec.params_schema)
    if parameters:
        lines += [
            "",
            "## Parameters",
            "",
            "| name | kind | bounds | default | |",
            "| --- | --- | --- | --- | --- |",
        ]
        for parameter, schema in parameters.items():
            default = default_text(schema) if "default" in schema else "required"
            cells = (
                f"`{parameter}`",
                kind_text(schema),
                bounds_text(schema),
                default,
                schema.get("description", ""),
            )
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    if spec.invariants:
        lines += ["", "## Promises", ""]
        lines += [f"- {promise(i)}" for i in spec.invariants]
    if spec.cost:
        lines += [
            "",
            "## Cost",
            "",
            f"Images through the model: forward `{spec.cost.forward}`, backward `{spec.cost.backward}`.",
        ]
    if spec.references:
        lines += ["", "## References", ""]
        lines += [f"- {r.authors} ({r.year}). [{r.title}]({r.url})." for r in spec.references]
    lines += ["", "## Use", "", "```", f"phosphene run {spec.short_name}", "```", ""]
    return "\n".join(lines)


def promise(invariant: Invariant) -> str:
    """What an invariant says, of the field and the parameters that it says it of."""
    text = (type(invariant).__doc__ or "").strip().partition("\n")[0]
    for name, value in invariant.model_dump().items():
        text = text.replace(f"``{name}``", f"`{value}`")
    return f"{text} (When `{invariant.when}`.)" if invariant.when else text


pages = Path(__file__).parent / "methods"
pages.mkdir(exist_ok=True)
for stale in pages.glob("*.md"):
    stale.unlink()
names = sorted(methods)
for name in names:
    (pages / f"{name}.md").write_text(method_page(name))
toc = "\n".join(names)
(pages / "index.md").write_text(
    "# Methods\n\nEvery registered method, from its own spec.\n\n"
    f"```{{toctree}}\n:maxdepth: 1\n\n{toc}\n```\n"
)
