"""Configuration of the book; also writes one page per method, made from its spec."""

from pathlib import Path

from phosphene import methods

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
    properties = spec.params_schema["properties"]
    if properties:
        lines += ["", "## Parameters", "", "| name | default | allowed | |", "| --- | --- | --- | --- |"]
        for parameter, schema in properties.items():
            default = f"`{schema['default']!r}`" if "default" in schema else "required"
            text = schema.get("description", "")
            lines.append(f"| `{parameter}` | {default} | {allowed(schema)} | {text} |")
    if spec.invariants:
        lines += ["", "## Promises", ""]
        lines += [f"- {(type(i).__doc__ or '').strip().partition(chr(10))[0]}" for i in spec.invariants]
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


def allowed(schema: dict) -> str:
    """A parameter's choices or bounds, in a few characters."""
    options = schema.get("anyOf", [schema])
    words = []
    for option in options:
        if "enum" in option:
            words.append(" ".join(f"`{v}`" for v in option["enum"]))
            continue
        bounds = [
            f"{sign} {option[key]}"
            for key, sign in (
                ("minimum", "≥"),
                ("exclusiveMinimum", ">"),
                ("maximum", "≤"),
                ("exclusiveMaximum", "<"),
            )
            if key in option
        ]
        words.append(" ".join([str(option.get("type", option.get("const", ""))), *bounds]))
    return " or ".join(words)


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
