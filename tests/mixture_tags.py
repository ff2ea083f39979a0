"""The prompt of a mixture, by Python: what the sliders of the tab "Use" must come to."""

from hyper_merge.loras.prompt_tags import format_tag
from hyper_merge.runs.weighted_loras import tag_rows, weighted_loras_of_mixture


def mixture_tags(run, shares):
    """Returns the prompt tags of a mixture of a run's checkpoints, one for each LoRA."""
    present = {name: share for name, share in shares.items() if share}
    rows = [row for name in present for row in tag_rows(run, name)]
    separate = {name for name, _, text in rows if text is not None}
    return " ".join(
        format_tag(name, lora.multiplier, lora.text_multiplier if name in separate else None)
        for lora in weighted_loras_of_mixture(run, present)
        for name in (lora.path.stem,)
    )
