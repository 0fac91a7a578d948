"""Everything of ComfyUI that `host` uses, by what it is used for. Looked up when the pack is loaded; see `drift`."""

import sys

TRIED = ("0.3.75", "0.33.0")
TORCH = "2.4"  # the first with torch.utils.checkpoint.CheckpointPolicy

OPENAI, ATTENTION = "comfy.ldm.modules.diffusionmodules.openaimodel", "comfy.ldm.modules.attention"

NEEDS = {
    # a MODEL: recognised by its classes, attached to by the names of its modules; cloned and patched, never changed
    "model": {
        f"{OPENAI}:UNetModel": "forward(x, timesteps, context, y, control, transformer_options) "
        "in_channels channel_mult num_classes out output_blocks",
        f"{OPENAI}:ResBlock": "in_layers out_layers",
        ATTENTION: "attention_pytorch(q, k, v, heads, mask, attn_precision)",
        f"{ATTENTION}:SpatialTransformer": "transformer_blocks",
        f"{ATTENTION}:BasicTransformerBlock": "attn1 attn2 norm1 n_heads d_head",
        f"{ATTENTION}:CrossAttention": "to_q to_k to_v heads dim_head",
        "comfy.model_patcher:ModelPatcher": "__init__(model, load_device, offload_device) "
        "model load_device offload_device model_options attachments patches object_patches wrappers "
        "clone() get_model_object(name) get_key_patches(filter_prefix) add_patches(patches, strength_patch) "
        "add_wrapper_with_key(wrapper_type, key, wrapper) get_wrappers(wrapper_type, key) "
        "remove_wrappers_with_key(wrapper_type, key) "
        "set_additional_models(key, models) get_nested_additional_models() set_attachments(key, attachment)",
        "comfy.patcher_extension:WrappersMP": "DIFFUSION_MODEL OUTER_SAMPLE PREPARE_SAMPLING APPLY_MODEL PREDICT_NOISE "
        "CALC_COND_BATCH",
        "comfy.patcher_extension:WrapperExecutor": "__call__() class_obj",
        "comfy.model_base:BaseModel": "diffusion_model model_config model_sampling latent_format manual_cast_dtype "
        "get_dtype()",
        "comfy.model_base": "SDXL",
        "comfy.latent_formats:LatentFormat": "latent_channels",
        "comfy.model_sampling:ModelSamplingDiscrete": "sigmas",
        "comfy.model_sampling:EPS": "calculate_denoised()",
        "comfy.model_sampling:V_PREDICTION": "calculate_denoised()",
        "comfy.samplers:CFGGuider": "model_options",
    },
    # the weights that are run, LoRAs merged
    "weights": {"comfy.lora": "calculate_weight(patches, weight, key)"},
    # weights whose queries are low-rank changes
    "low-rank weights": {"comfy.lora": "load_lora(lora, to_load)"},
    # DDIM in both directions, with previews and Cancel
    "sampling": {
        "comfy.samplers:CFGGuider": "__init__(model_patcher) set_conds(positive, negative) set_cfg(cfg) "
        "sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed) "
        "predict_noise(x, timestep, model_options, seed) inner_set_conds(conds) model_patcher inner_model conds",
        "comfy.samplers": "calc_cond_batch(model, conds, x_in, timestep, model_options)",
        "comfy.sampler_helpers": "prepare_mask(noise_mask, shape, device)",
        "comfy.samplers:KSAMPLER": "__init__(sampler_function)",
        "comfy.model_sampling:ModelSamplingDiscrete": "sigma_max percent_to_sigma(percent)",
        "comfy.model_sampling:EPS": "noise_scaling(sigma, noise, latent_image, max_denoise)",
        "comfy.model_base:BaseModel": "process_latent_in(latent) process_latent_out(latent)",
        "comfy.model_management": "load_models_gpu(models) intermediate_device() "
        "throw_exception_if_processing_interrupted()",
        "comfy.utils": "PROGRESS_BAR_ENABLED",
        "latent_preview": "prepare_callback(model, steps)",
    },
    "tuning": {
        f"{OPENAI}:UNetModel": "__init__(image_size, in_channels, model_channels, out_channels, num_res_blocks, dtype, "
        "device, operations)",
        "comfy.model_management": "unload_all_models() soft_empty_cache() get_free_memory(dev) should_use_bf16(device) "
        "InterruptProcessingException",
        "comfy.utils:ProgressBar": "__init__(total) update_absolute(value, total, preview)",
        "comfy.sampler_helpers": "convert_cond(cond)",
        "comfy.samplers": "encode_model_conds(model_function, conds, noise, device, prompt_type)",
        "comfy.model_base:BaseModel": "extra_conds()",
        "comfy.conds:CONDRegular": "cond",
        "latent_preview": "get_previewer(device, latent_format)",
        "latent_preview:LatentPreviewer": "decode_latent_to_preview(x0)",
        "latent_preview:Latent2RGBPreviewer": "__init__(latent_rgb_factors, latent_rgb_factors_bias)",
        "comfy.latent_formats:LatentFormat": "latent_rgb_factors latent_rgb_factors_bias",
        "folder_paths": "get_user_directory()",
        "torch.utils.checkpoint": "CheckpointPolicy create_selective_checkpoint_contexts()",
    },
    # where words are in a text
    "text": {"comfy.sd:CLIP": "tokenize(text) encode_from_tokens_scheduled(tokens)"},
    "files": {
        "folder_paths": "models_dir folder_names_and_paths add_model_folder_path(folder_name, full_folder_path) "
        "get_folder_paths(folder_name) get_filename_list(folder_name) recursive_search(directory)",
    },
    # what CLIP sees and reads
    "scores": {
        "comfy.clip_vision:ClipVisionModel": "model load_device image_size encode_image(image) get_sd()",
        "comfy.clip_model:CLIPVision": "encoder post_layernorm output_layernorm",
        "comfy.clip_model:CLIPEncoder": "layers",
        "comfy.sd:CLIP": "tokenize(text) encode_from_tokens(tokens, return_pooled)",
        "comfy.model_management": "throw_exception_if_processing_interrupted()",
    },
    "published models": {"comfy.utils": "unet_to_diffusers(unet_config)"},
    # a MODEL, CLIP and VAE of sizes that the host does not recognise
    "demo": {
        "comfy.model_base:BaseModel": "__init__(model_config, model_type)",
        "comfy.model_base:ModelType": "EPS V_PREDICTION",
        "comfy.latent_formats:LatentFormat": "latent_rgb_factors latent_rgb_factors_bias taesd_decoder_name",
        "comfy.model_management": "get_torch_device() unet_offload_device()",
        "comfy.supported_models:SD15": "__init__(unet_config) unet_config",
        "comfy.supported_models_base:ClipTarget": "__init__(tokenizer, clip)",
        "comfy.sd:CLIP": "__init__(target, model_options) cond_stage_model",
        "comfy.sd:VAE": "__init__(sd)",
        "comfy.sd1_clip": "SD1Tokenizer SD1ClipModel",
    },
}

if "server" in sys.modules:  # it starts half of the host, and tools work without it
    NEEDS["tuning"]["server:PromptServer"] = "instance send_progress_text(text, node_id)"
