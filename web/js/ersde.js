// The preset node: choosing one of a person's own presets copies its settings into the node, so that the workflow carries them.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "ersde.preset",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "ERSDE_Preset") return;
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function () {
      created?.apply(this, arguments);
      const find = (name) => this.widgets?.find((widget) => widget.name === name);
      const preset = find("preset");
      if (!preset) return;
      const chosen = preset.callback;
      preset.callback = function (value) {
        chosen?.apply(this, arguments);
        const settings = find("settings");
        // What the lists were last filled with: pressing R brings it up to date.
        const carried = preset.options?.ersde_carried ?? nodeData.input?.required?.preset?.[1]?.ersde_carried ?? {};
        if (settings) settings.value = carried[value] ?? "";
      };
    };
  },
});
