"""Write what ComfyUI shows about the nodes: locales/, and the tables of inputs in the help pages (web/docs).

    python docs/make_comfyui_help.py [--check]

English comes from nodes.py, Chinese from docs/help/zh.json; the pages' text stands in the pages themselves.  --check writes
nothing and exits with 1 if something is out of date.
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
HEADS = {"en": ("Input", "What it does"), "zh": ("输入", "作用")}
TABLE = re.compile(r"(?<=<!-- inputs -->\n).*?(?=<!-- /inputs -->)", re.S)


def schemas():
    """The nodes' schemas, read without a host."""
    from comfy_schema import load_nodes

    nodes = load_nodes()
    nodes.comfyui.scheduler_names = lambda: ["normal"]
    nodes.comfyui.preset_names = lambda: list(nodes.PRESETS)
    nodes.comfyui.carried_texts = dict
    return [node.define_schema() for node in nodes.NODES]


def english(schema):
    """A node's definition as ComfyUI's nodeDefs.json has it, from its schema."""
    return {
        "display_name": schema.display_name, "description": schema.description,
        "inputs": {each.id: {"name": each.id, "tooltip": each.options["tooltip"]} for each in schema.inputs},
        "outputs": {str(i): {"name": each.options.get("display_name") or each.kind, "tooltip": each.options["tooltip"]}
                    for i, each in enumerate(schema.outputs)},
    }


def chinese(schema, texts):
    """The same in Chinese; KeyError where a text is missing."""
    node = texts["nodes"][schema.node_id]
    own = node.get("inputs", {})
    pair = lambda words: dict(zip(("name", "tooltip"), words))
    return {
        "display_name": node["display_name"], "description": node["description"],
        "inputs": {each.id: pair(own.get(each.id) or texts["inputs"][each.id]) for each in schema.inputs},
        "outputs": {str(i): pair(node["outputs"][i]) for i in range(len(schema.outputs))},
    }


def table(definition, language):
    """The inputs as a Markdown table, by the names of the files and the API."""
    cell = lambda text: text.strip().replace("|", "\\|").replace("\n", "<br>")
    rows = ["| {} | {} |".format(*HEADS[language]), "|---|---|"]
    for key, each in definition["inputs"].items():
        name = f"`{key}`" if each["name"] == key else f"{each['name']} `{key}`"
        rows.append(f"| {name} | {cell(each['tooltip'])} |")
    return "\n".join(rows) + "\n"


def files():
    """{path: content} of all that is made."""
    texts = json.loads((ROOT / "docs" / "help" / "zh.json").read_text(encoding="utf-8"))
    made = {"en": {}, "zh": {}}
    for schema in schemas():
        made["en"][schema.node_id], made["zh"][schema.node_id] = english(schema), chinese(schema, texts)
    out = {}
    for language, nodes in made.items():
        out[ROOT / "locales" / language / "nodeDefs.json"] = json.dumps(nodes, ensure_ascii=False, indent=2) + "\n"
        for key, definition in nodes.items():
            page = ROOT / "web" / "docs" / (f"{key}.md" if language == "en" else f"{key}/{language}.md")
            text = page.read_text(encoding="utf-8")
            if not TABLE.search(text):
                raise ValueError(f"{page}: no table of inputs between <!-- inputs --> and <!-- /inputs -->")
            out[page] = TABLE.sub(lambda _: table(definition, language), text)
    return out


def main(arguments):
    stale = []
    for path, content in files().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            stale.append(path)
            if "--check" not in arguments:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
    for path in stale:
        print("out of date:" if "--check" in arguments else "written:", path.relative_to(ROOT))
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
