"""Every key of a run, with its default, unit and reason. Other files hold differences only."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The published Z-Image recipe, except where a comment says otherwise."""
    c = ConfigDict()
    # What to train on.
    c.model = ""              # pipeline directory (model_index.json, transformer/, vae/, ..)
    c.published = "z_image_turbo"  # whose sizes are planned for where no model is given
    c.vlm = ""                # directory in the format of Qwen3-VL-4B-Instruct, for the teacher
    c.data = ""               # JSONL of the published format, a folder of images and .txt, Parquet
                              # or ArrayRecord files, or several, "a.jsonl,b.parquet"; what a row
                              # holds depends on the recipe
    c.data_weights = ""       # shares of the pictures from each of several, "3,1"; by default each
                              # row is seen equally often
    c.data_root = ""          # images may not lie outside; default: where the JSONL is
    c.cache = ""              # folder (or gs://..) of dopsd_jax.encode; training loads no encoder
    c.encode = "ahead"        # ahead: all data is checked and encoded before the run | online: an
                              # index is made, the rest is done when a row's turn comes
    c.resolution = 1024       # pixels; buckets are the published ones at this area
    c.buckets = ""            # or own ones, "512x512,768x512" (width x height)
    c.small_buckets = "error"  # bucket with fewer rows than batch_size: error | repeat
    c.text_tokens = 512       # padded prompt length of the student; FLUX.2 has 512 for both
    c.teacher_tokens = 1024   # padded length of the teacher's prompt and, with vlm, the image
    c.truncate_prompts = False  # published: True; here a prompt that is too long is an error

    # The method.
    c.objective = "dopsd"     # dopsd | sft (plain flow matching on the images, to compare with)
    c.states = "student"      # student (on its own trajectory) | off-policy: teacher, noised
    c.base_lora = ""          # LoRA file put into the frozen weights while training, such as one
                              # that undoes a distillation
    c.recipe = "vlm"          # what the teacher sees: vlm (prompt and target image), edit (target
                              # as reference), edit_ref (references, target as the last), text (a
                              # longer text), subject_ref (other pictures of the subject)
    c.teacher_words = "published"  # added to the teacher's prompt: the recipe's own, or any text
    c.trainable = "lora"      # lora | full
    c.num_steps = 4           # S, denoiser calls of the training rollout
    c.schedule = "shifted"    # the sampler's own; as published: reference8 (Z-Image, 8 steps),
                              # reference (FLUX.2-klein)
    c.shift = 0.0             # 0: the sampler's (Z-Image-Turbo 3; FLUX.2's follows S and bucket)
    c.loss = "x0"             # x0 | velocity; published: x0, which is sigma^2 times velocity
    c.teacher = "ema"         # ema | frozen | live (live is known to collapse)
    c.ema_decay = 0.9999      # per update, in float32
    c.ema_dtype = "float32"   # in which the teacher is kept; bfloat16: half, rounded at random
    c.vlm_rope_theta = 0.0    # 0: Qwen3-VL's 5e6 as published; 1e6: the text encoder's own
    c.vlm_min_pixels = 512 * 512  # area at which the vision tower looks at the target
    c.vlm_max_pixels = 768 * 768
    c.double_template = False  # published: True, by accident

    c.lora = ConfigDict()
    c.lora.rank = 64
    c.lora.alpha = 128.0      # the LoRA is scaled by alpha / rank
    c.lora.targets = "published"  # published | attention | all | regexes of parameter names

    # The optimizer.
    c.num_train_steps = 2000  # updates
    c.batch_size = 4          # images per update, over all devices
    c.accumulation = 1        # micro-batches per update; divides batch_size
    c.learning_rate = 1e-4
    c.warmup_steps = 0        # updates of linear warm-up
    c.b1, c.b2, c.eps = 0.9, 0.999, 1e-8
    c.weight_decay = 0.0
    c.max_grad_norm = 1.0
    c.moments_dtype = "float32"  # of Adam between updates; bfloat16: half, rounded at random
    c.seed = 30

    # The machine.
    c.dtype = "bfloat16"      # frozen weights and compute; LoRA, EMA, moments are float32
    c.vae_dtype = "float32"
    c.remat = "full"          # full | attention | matmuls | linears | dots | activations | none:
                              # from least memory to least compute, see models/layers.py
    c.mesh = ConfigDict()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = -1, 1, 1

    # What to see and keep.
    c.preflight = "on"        # on | off: before the run, does the teacher know more at all?
    c.log_every = 10          # updates
    c.sample_every = 100      # updates; 0: never
    c.sample_steps = 4        # denoiser calls of preview pictures
    c.sample_rows = 4         # training rows shown in previews
    c.sample_prompts = ()     # further prompts, drawn by base and student
    # Unrelated prompts, the same in every run: what became of them is the run's gauges, drawn with
    # sample_every. Empty: no gauges of retention.
    c.gauge_prompts = (
        "a lighthouse on a rocky coast at dawn", "a bowl of ramen on a wooden table, from above",
        "portrait of an old man with a white beard, studio light",
        "a narrow street in a rainy city at night, neon signs",
    )
    c.checkpoint_every = 500  # updates
    c.keep_checkpoints = 5    # latest checkpoints kept
    return c
