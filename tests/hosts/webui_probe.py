"""A script that the tests put in the WebUI beside the pack: what the last runs asked of the network, and its answers."""
from modules import script_callbacks

RECORD = []


def asked(params):
    """The newest image of a batch alone: the first, whatever the host repeats it for."""
    forge = getattr(params.denoiser.inner_model.inner_model, "forge_objects", None)
    RECORD.append({"sigma": float(params.sigma[0]), "x": params.x[:1].double().tolist(), "fork": forge is not None})
    if forge and conditional not in forge.unet.model_options.get("sampler_post_cfg_function", ()):
        forge.unet.set_model_sampler_post_cfg_function(conditional)     # the forks do not show their predictions


def predicted(params):
    """The prediction for the first prompt, before any guidance."""
    RECORD[-1]["conditional"] = params.x[:1].double().tolist()


def conditional(args):
    RECORD[-1]["conditional"] = args["cond_denoised"][:1].double().tolist()
    return args["denoised"]


def answered(params):
    RECORD[-1]["denoised"] = params.x[:1].double().tolist()


def hand_over():
    """All since the last time."""
    record = list(RECORD)
    RECORD.clear()
    return record


script_callbacks.on_cfg_denoiser(asked)
script_callbacks.on_cfg_denoised(predicted)
script_callbacks.on_cfg_after_cfg(answered)
script_callbacks.on_app_started(lambda _, app: app.add_api_route("/ersde-probe", hand_over))
