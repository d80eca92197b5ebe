"""How flow pipelines lay their steps: more of them at high noise the larger the image."""

from __future__ import annotations

from typing import Any


def dynamic_shift(scheduler: Any, num_tokens: int) -> dict[str, float]:
    """{mu}: the shift for an image of `num_tokens`, where the scheduler's config asks for one."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    mu = calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return {"mu": mu}
