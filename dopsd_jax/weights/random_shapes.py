"""Tensor names and shapes of the models of a random pipeline, as their files have them.

Functions of a config; they share nothing with the name tables that load such files.

Source: diffusers 0.42.1 and transformers 5.23.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def affine(name: str, *weight: int) -> Shapes:
    """A layer with weight and bias; the bias is as long as the weight's leading axis."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _resnet(name: str, cin: int, cout: int) -> Shapes:
    shapes = {
        **affine(f"{name}.norm1", cin),
        **affine(f"{name}.conv1", cout, cin, 3, 3),
        **affine(f"{name}.norm2", cout),
        **affine(f"{name}.conv2", cout, cout, 3, 3),
    }
    return shapes if cin == cout else shapes | affine(f"{name}.conv_shortcut", cout, cin, 1, 1)


def _mid_block(name: str, c: int) -> Shapes:
    shapes = affine(f"{name}.attentions.0.group_norm", c)
    for p in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= affine(f"{name}.attentions.0.{p}", c, c)
    return shapes | _resnet(f"{name}.resnets.0", c, c) | _resnet(f"{name}.resnets.1", c, c)


def _half_vae(half: str, blocks: str, resample: str, widths: list[int], resnets: int) -> Shapes:
    """The blocks of the encoder or the decoder; every block but the last resamples at its end."""
    shapes, cin = {}, widths[0]
    for i, cout in enumerate(widths):
        name = f"{half}.{blocks}.{i}"
        for j in range(resnets):
            shapes |= _resnet(f"{name}.resnets.{j}", cin if j == 0 else cout, cout)
        if i < len(widths) - 1:
            shapes |= affine(f"{name}.{resample}.0.conv", cout, cout, 3, 3)
        cin = cout
    return shapes


def vae_shapes(c: dict) -> Shapes:
    """Tensor names and shapes of an AutoencoderKL with config `c`, without quant convolutions."""
    widths, latent, n = c["block_out_channels"], c["latent_channels"], c["layers_per_block"]
    return {
        **affine("encoder.conv_in", widths[0], c["in_channels"], 3, 3),
        **_half_vae("encoder", "down_blocks", "downsamplers", widths, n),
        **_mid_block("encoder.mid_block", widths[-1]),
        **affine("encoder.conv_norm_out", widths[-1]),
        **affine("encoder.conv_out", 2 * latent, widths[-1], 3, 3),
        **affine("decoder.conv_in", widths[-1], latent, 3, 3),
        **_half_vae("decoder", "up_blocks", "upsamplers", widths[::-1], n + 1),
        **_mid_block("decoder.mid_block", widths[-1]),
        **affine("decoder.conv_norm_out", widths[0]),
        **affine("decoder.conv_out", c["out_channels"], widths[0], 3, 3),
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
        **affine("patch_embed.proj", width, *kernel),
        "pos_embed.weight": (c["num_position_embeddings"], width),
    }
    for block in (f"blocks.{i}" for i in range(c["depth"])):
        shapes |= affine(f"{block}.norm1", width) | affine(f"{block}.norm2", width)
        shapes |= affine(f"{block}.attn.qkv", 3 * width, width)
        shapes |= affine(f"{block}.attn.proj", width, width)
        shapes |= affine(f"{block}.mlp.linear_fc1", mlp, width)
        shapes |= affine(f"{block}.mlp.linear_fc2", width, mlp)
    mergers = [f"deepstack_merger_list.{k}" for k in range(len(c["deepstack_visual_indexes"]))]
    for merger in ["merger", *mergers]:
        # The main merger normalises before it groups four patches, the others after.
        shapes |= affine(f"{merger}.norm", width if merger == "merger" else merged)
        shapes |= affine(f"{merger}.linear_fc1", merged, merged)
        shapes |= affine(f"{merger}.linear_fc2", c["out_hidden_size"], merged)
    return {prefix + name: shape for name, shape in shapes.items()}
