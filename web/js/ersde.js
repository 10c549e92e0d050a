// The preset node: choosing one of a person's own presets copies its settings into the node, so that the workflow carries them.
import { app } from "../../../scripts/app.js";

const NODE = "ERSDE_Preset";
const inputOf = (definition) => definition?.input?.required?.preset?.[1]?.ersde_carried;
let carried = {}; // preset name -> settings, as the lists were last filled

app.registerExtension({
  name: "ersde.preset",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    carried = inputOf(nodeData) ?? carried;
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function () {
      const result = created?.apply(this, arguments);
      const find = (name) => this.widgets?.find((widget) => widget.name === name);
      const preset = find("preset");
      const chosen = preset?.callback;
      if (preset)
        preset.callback = function (value) {
          const settings = find("settings");
          if (settings) settings.value = carried[value] ?? "";
          return chosen?.apply(this, arguments);
        };
      return result;
    };
  },

  // R on the canvas, after a preset was saved.
  refreshComboInNodes(definitions) {
    carried = inputOf(definitions?.[NODE]) ?? carried;
  },
});
