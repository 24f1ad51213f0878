"""Tensor names and shapes of the models of a random pipeline, as their files have them.

Functions of a config; they share nothing with the name tables that load such files.

Source: diffusers 0.42.1 and transformers 5.23.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def _affine(name: str, *weight: int) -> Shapes:
    """A layer with weight and bias; the bias is as long as the weight's leading axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def transformer_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of a Z-Image transformer with config `c`."""
    dim, cond, mlp = c["dim"], min(c["dim"], 256), int(c["dim"] / 3 * 8)
    (patch,), (frames,) = c["all_patch_size"], c["all_f_patch_size"]
    patch_dim, key = patch**2 * frames * c["in_channels"], f"{patch}-{frames}"
    shapes = {
        "x_pad_token": (1, dim),
        "cap_pad_token": (1, dim),
        **_affine(f"all_x_embedder.{key}", dim, patch_dim),
        **_affine(f"all_final_layer.{key}.linear", patch_dim, dim),
        **_affine(f"all_final_layer.{key}.adaLN_modulation.1", dim, cond),
        **_affine("t_embedder.mlp.0", 1024, 256),
        **_affine("t_embedder.mlp.2", cond, 1024),
        "cap_embedder.0.weight": (c["cap_feat_dim"],),
        **_affine("cap_embedder.1", dim, c["cap_feat_dim"]),
    }
    refiners = c["n_refiner_layers"]
    stacks = {"noise_refiner": refiners, "context_refiner": refiners, "layers": c["n_layers"]}
    for stack, depth in stacks.items():
        for block in (f"{stack}.{i}" for i in range(depth)):
            for p in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{block}.attention.{p}.weight"] = (dim, dim)
            for p in ("norm_q", "norm_k"):
                shapes[f"{block}.attention.{p}.weight"] = (dim // c["n_heads"],)
            for p, shape in {"w1": (mlp, dim), "w2": (dim, mlp), "w3": (mlp, dim)}.items():
                shapes[f"{block}.feed_forward.{p}.weight"] = shape
            for p in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                shapes[f"{block}.{p}.weight"] = (dim,)
            if stack != "context_refiner":
                shapes |= _affine(f"{block}.adaLN_modulation.0", 4 * dim, cond)
    return shapes


def flux2_transformer_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of a FLUX.2 transformer with config `c`; it has no biases."""
    head = c["attention_head_dim"]
    dim = head * c["num_attention_heads"]
    mlp = int(dim * c["mlp_ratio"])
    shapes = {
        "x_embedder": (dim, c["in_channels"]),
        "context_embedder": (dim, c["joint_attention_dim"]),
        "time_guidance_embed.timestep_embedder.linear_1": (dim, c["timestep_guidance_channels"]),
        "time_guidance_embed.timestep_embedder.linear_2": (dim, dim),
        "double_stream_modulation_img.linear": (6 * dim, dim),
        "double_stream_modulation_txt.linear": (6 * dim, dim),
        "single_stream_modulation.linear": (3 * dim, dim),
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (c["in_channels"], dim),
    }
    for block in (f"transformer_blocks.{i}" for i in range(c["num_layers"])):
        for p in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj",
                  "to_add_out"):
            shapes[f"{block}.attn.{p}"] = (dim, dim)
        for p in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{p}"] = (head,)
        for ff in ("ff", "ff_context"):
            shapes[f"{block}.{ff}.linear_in"] = (2 * mlp, dim)
            shapes[f"{block}.{ff}.linear_out"] = (dim, mlp)
    for block in (f"single_transformer_blocks.{i}" for i in range(c["num_single_layers"])):
        shapes[f"{block}.attn.to_qkv_mlp_proj"] = (3 * dim + 2 * mlp, dim)
        shapes[f"{block}.attn.to_out"] = (dim, dim + mlp)
        for p in ("norm_q", "norm_k"):
            shapes[f"{block}.attn.{p}"] = (head,)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def flux2_vae_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of an AutoencoderKLFlux2 with config `c`, but for the step count."""
    latent = c["latent_channels"]
    return {
        **vae_shapes(c),
        **_affine("quant_conv", 2 * latent, 2 * latent, 1, 1),
        **_affine("post_quant_conv", latent, latent, 1, 1),
        "bn.running_mean": (4 * latent,),
        "bn.running_var": (4 * latent,),
    }


def _resnet(name: str, cin: int, cout: int) -> Shapes:
    shapes = {
        **_affine(f"{name}.norm1", cin),
        **_affine(f"{name}.conv1", cout, cin, 3, 3),
        **_affine(f"{name}.norm2", cout),
        **_affine(f"{name}.conv2", cout, cout, 3, 3),
    }
    return shapes if cin == cout else shapes | _affine(f"{name}.conv_shortcut", cout, cin, 1, 1)


def _mid_block(name: str, c: int) -> Shapes:
    shapes = _affine(f"{name}.attentions.0.group_norm", c)
    for p in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= _affine(f"{name}.attentions.0.{p}", c, c)
    return shapes | _resnet(f"{name}.resnets.0", c, c) | _resnet(f"{name}.resnets.1", c, c)


def _half_vae(half: str, blocks: str, resample: str, widths: list[int], resnets: int) -> Shapes:
    """The blocks of the encoder or the decoder; every block but the last resamples at its end."""
    shapes, cin = {}, widths[0]
    for i, cout in enumerate(widths):
        name = f"{half}.{blocks}.{i}"
        for j in range(resnets):
            shapes |= _resnet(f"{name}.resnets.{j}", cin if j == 0 else cout, cout)
        if i < len(widths) - 1:
            shapes |= _affine(f"{name}.{resample}.0.conv", cout, cout, 3, 3)
        cin = cout
    return shapes


def vae_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of an AutoencoderKL with config `c`, without quant convolutions."""
    widths, latent, n = c["block_out_channels"], c["latent_channels"], c["layers_per_block"]
    return {
        **_affine("encoder.conv_in", widths[0], c["in_channels"], 3, 3),
        **_half_vae("encoder", "down_blocks", "downsamplers", widths, n),
        **_mid_block("encoder.mid_block", widths[-1]),
        **_affine("encoder.conv_norm_out", widths[-1]),
        **_affine("encoder.conv_out", 2 * latent, widths[-1], 3, 3),
        **_affine("decoder.conv_in", widths[-1], latent, 3, 3),
        **_half_vae("decoder", "up_blocks", "upsamplers", widths[::-1], n + 1),
        **_mid_block("decoder.mid_block", widths[-1]),
        **_affine("decoder.conv_norm_out", widths[0]),
        **_affine("decoder.conv_out", c["out_channels"], widths[0], 3, 3),
    }


def language_shapes(c: dict, prefix: str) -> Shapes:
    """Tensor names and shapes of a Qwen3Model with config `c`; the tied head is no tensor."""
    width, mlp, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {
        f"{prefix}embed_tokens.weight": (c["vocab_size"], width),
        **{
            f"{prefix}layers.{i}.{p}.weight": shape
            for i in range(c["num_hidden_layers"])
            for p, shape in layer.items()
        },
        f"{prefix}norm.weight": (width,),
    }


def vision_shapes(c: dict, prefix: str) -> Shapes:
    """Tensor names and shapes of the Qwen3-VL vision tower with vision_config `c`."""
    width, mlp, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    merged = width * c["spatial_merge_size"] ** 2
    kernel = (c["in_channels"], c["temporal_patch_size"], patch, patch)
    shapes = {
        **_affine("patch_embed.proj", width, *kernel),
        "pos_embed.weight": (c["num_position_embeddings"], width),
    }
    for block in (f"blocks.{i}" for i in range(c["depth"])):
        shapes |= _affine(f"{block}.norm1", width) | _affine(f"{block}.norm2", width)
        shapes |= _affine(f"{block}.attn.qkv", 3 * width, width)
        shapes |= _affine(f"{block}.attn.proj", width, width)
        shapes |= _affine(f"{block}.mlp.linear_fc1", mlp, width)
        shapes |= _affine(f"{block}.mlp.linear_fc2", width, mlp)
    mergers = [f"deepstack_merger_list.{k}" for k in range(len(c["deepstack_visual_indexes"]))]
    for merger in ["merger", *mergers]:
        # The main merger normalises before it groups four patches, the others after.
        shapes |= _affine(f"{merger}.norm", width if merger == "merger" else merged)
        shapes |= _affine(f"{merger}.linear_fc1", merged, merged)
        shapes |= _affine(f"{merger}.linear_fc2", c["out_hidden_size"], merged)
    return {prefix + name: shape for name, shape in shapes.items()}
