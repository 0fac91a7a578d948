"""Everything of ComfyUI that `host` uses, and why. Looked up when the pack is loaded; see `drift`."""

from .drift import Symbol

TRIED = "0.3.75 to 0.33.0"

SYMBOLS = (
    # --- the UNet: recognised by its classes, and attached to by the names of its modules ---
    Symbol(
        "comfy.ldm.modules.diffusionmodules.openaimodel:UNetModel",
        "to recognise a Stable Diffusion UNet, and to build a private one for tuning",
        call="image_size, in_channels, model_channels, out_channels, num_res_blocks, dtype, device, operations",
        methods={"forward": "x, timesteps, /, context, y, control, transformer_options"},
        attributes=("in_channels", "channel_mult", "num_classes", "out"),
    ),
    Symbol(
        "comfy.ldm.modules.diffusionmodules.openaimodel:ResBlock",
        "to find the group norms that see the whole video",
        attributes=("in_layers", "out_layers"),
    ),
    Symbol("comfy.ldm.modules.attention:SpatialTransformer", "to checkpoint gradients stage by stage"),
    Symbol(
        "comfy.ldm.modules.attention:BasicTransformerBlock",
        "to attach sparse-causal and temporal attention",
        attributes=("attn1", "attn2", "norm1", "n_heads", "d_head"),
    ),
    Symbol(
        "comfy.ldm.modules.attention:CrossAttention",
        "to attach sparse-causal attention",
        attributes=("to_q", "to_k", "to_v", "heads", "dim_head"),
    ),
    Symbol(
        "comfy.ldm.modules.attention:attention_pytorch",
        "to sample on a CPU with torch's attention",
        "q, k, v, heads, /, mask, attn_precision",
    ),
    # --- a MODEL: cloned and patched, never changed ---
    Symbol(
        "comfy.model_patcher:ModelPatcher",
        "to inflate and tune without touching the base model",
        call="model, load_device, offload_device, /",
        methods={
            "clone": "",
            "get_model_object": "name, /",
            "get_key_patches": "filter_prefix, /",
            "add_patches": "patches, /, strength_patch",
            "add_wrapper_with_key": "wrapper_type, key, wrapper, /",
            "remove_wrappers_with_key": "wrapper_type, key, /",
            "set_additional_models": "key, models, /",
            "get_nested_additional_models": "",
            "set_attachments": "key, attachment, /",
        },
        attributes=("model", "load_device", "offload_device", "model_options", "attachments"),
    ),
    Symbol(
        "comfy.patcher_extension:WrappersMP.DIFFUSION_MODEL",
        "to make a UNet call a video call",
    ),
    Symbol("comfy.patcher_extension:WrappersMP.OUTER_SAMPLE", "to refuse context windows"),
    Symbol(
        "comfy.patcher_extension:WrapperExecutor",
        "to go on from a wrapper, and to know the UNet or the guider that it wraps",
        attributes=("__call__", "class_obj"),
    ),
    Symbol(
        "comfy.model_base:BaseModel",
        "to reach the UNet, its configuration and the scale of its latents",
        call="model_config, /, model_type",
        methods={"get_dtype": "", "process_latent_in": "latent, /"},
        attributes=("diffusion_model", "model_config", "model_sampling", "latent_format", "manual_cast_dtype"),
    ),
    Symbol("comfy.latent_formats:LatentFormat.latent_channels", "to recognise inpainting models"),
    Symbol("comfy.lora:calculate_weight", "to tune the weights that are run, LoRAs merged", "patches, weight, key, /"),
    # --- sampling ---
    Symbol(
        "comfy.model_sampling:ModelSamplingDiscrete",
        "to know the noise level of each timestep",
        attributes=("sigmas", "sigma_max"),
    ),
    Symbol(
        "comfy.model_sampling:EPS",
        "to recognise models that predict noise, and to give inverted latents as NOISE",
        methods={
            "calculate_denoised": "sigma, model_output, model_input, /",
            "noise_scaling": "sigma, noise, latent_image, max_denoise, /",
        },
    ),
    Symbol("comfy.model_sampling:V_PREDICTION.calculate_denoised", "to recognise models that predict velocity"),
    Symbol(
        "comfy.samplers:CFGGuider",
        "to invert and sample with LoRA, ControlNet, regional prompts, previews and Cancel",
        call="model_patcher, /",
        methods={
            "set_conds": "positive, negative, /",
            "set_cfg": "cfg, /",
            "sample": "noise, latent_image, sampler, sigmas, /, callback, disable_pbar, seed",
        },
        attributes=("model_options",),
    ),
    Symbol("comfy.samplers:KSAMPLER", "to sample with DDIM in both directions", "sampler_function, /"),
    # --- devices, memory, Cancel ---
    Symbol("comfy.model_management:get_torch_device", "to run the demo's model", ""),
    Symbol("comfy.model_management:unet_offload_device", "to run the demo's model", ""),
    Symbol("comfy.model_management:intermediate_device", "to return latents where nodes expect them", ""),
    Symbol("comfy.model_management:load_models_gpu", "to load a model with its temporal layers", "models, /"),
    Symbol("comfy.model_management:unload_all_models", "to make room for a tune", ""),
    Symbol("comfy.model_management:soft_empty_cache", "to give memory back after a tune", ""),
    Symbol("comfy.model_management:get_free_memory", "to plan a tune's memory", "dev, /"),
    Symbol("comfy.model_management:should_use_bf16", "to choose a tune's precision", "device, /"),
    Symbol("comfy.model_management:throw_exception_if_processing_interrupted", "to stop at Cancel", ""),
    # --- progress ---
    Symbol(
        "comfy.utils:ProgressBar",
        "to show progress and the loss in the node",
        call="total, /",
        methods={"update_absolute": "value, total, preview, /"},
    ),
    Symbol("comfy.utils:PROGRESS_BAR_ENABLED", "to print no progress where the host prints none"),
    Symbol("latent_preview:prepare_callback", "to show previews of sampling", "model, steps, /"),
    Symbol("latent_preview:get_previewer", "to show previews of an edit while it is tuned", "device, latent_format, /"),
    Symbol(
        "latent_preview:LatentPreviewer",
        "to show previews of an edit while it is tuned",
        methods={"decode_latent_to_preview": "x0, /"},
    ),
    Symbol(
        "latent_preview:Latent2RGBPreviewer",
        "to show previews of an edit where those of sampling are off",
        call="latent_rgb_factors, /",
    ),
    Symbol("comfy.latent_formats:LatentFormat.latent_rgb_factors", "to show previews where those of sampling are off"),
    Symbol(
        "server:PromptServer",
        "to say in the node that a tune is resumed or reused",
        methods={"send_progress_text": "text, node_id, /"},
        attributes=("instance",),
        where_loaded=True,  # it starts half of the host, and tools work without it
    ),
    # --- folders ---
    Symbol("folder_paths:models_dir", "to find models/tune_a_video"),
    Symbol("folder_paths:add_model_folder_path", "to add models/tune_a_video", "folder_name, full_folder_path, /"),
    Symbol("folder_paths:folder_names_and_paths", "to list .safetensors files in models/tune_a_video"),
    Symbol("folder_paths:get_folder_paths", "to find the folders of weights", "folder_name, /"),
    Symbol("folder_paths:get_filename_list", "to list weights files", "folder_name, /"),
    Symbol("folder_paths:recursive_search", "to list published models", "directory, /"),
    Symbol("folder_paths:get_user_directory", "to keep a tune's state", ""),
    # --- published models, and the demo's own ---
    Symbol("comfy.utils:unet_to_diffusers", "to read and write published models", "unet_config, /"),
    Symbol(
        "comfy.supported_models:SD15", "to build the demo's model", call="unet_config, /", attributes=("unet_config",)
    ),
    Symbol("comfy.model_base:ModelType.EPS", "to build the demo's model"),
    Symbol("comfy.model_base:ModelType.V_PREDICTION", "to build models of one's own"),
    Symbol(
        "comfy.sd:CLIP",
        "to build the demo's text encoder",
        call="target, /, model_options",
        attributes=("cond_stage_model",),
    ),
    Symbol("comfy.sd:VAE", "to build the demo's VAE", "sd"),
    Symbol("comfy.sd1_clip:SD1Tokenizer", "to build the demo's text encoder"),
    Symbol("comfy.sd1_clip:SD1ClipModel", "to build the demo's text encoder"),
    Symbol("comfy.supported_models_base:ClipTarget", "to build the demo's text encoder", "tokenizer, clip, /"),
)
