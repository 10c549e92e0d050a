"""The workflow files of the pack, and how a canvas file becomes a prompt, as the page makes one of it."""
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
NAMES = [file.stem for file in FILES]
NOTES = ("MarkdownNote", "Note")
AFTER_SEED = ("fixed", "increment", "decrement", "randomize")


def load(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def to_prompt(graph):
    """The API's form of a canvas file without groups of nodes: {id: {"class_type", "inputs"}}."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        inputs, values = {}, list(node.get("widgets_values", ()))
        for slot in node["inputs"]:
            if "widget" in slot:
                value = values.pop(0)
                if slot["name"] != "upload":            # a button
                    inputs[slot["name"]] = value
                if "seed" in slot["name"] and values and values[0] in AFTER_SEED:
                    values.pop(0)
            if slot.get("link") is not None:
                inputs[slot["name"]] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
