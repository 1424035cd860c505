"Files under configs/ are runs that the library accepts; the paper's say what it and their names say."
from pathlib import Path

import pytest

from capo.folder import read_settings, settings
from capo.run import RunConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
QWEN = [p for p in CONFIGS if p.stem.startswith("qwen2.5-math")]
each = lambda paths: pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


def test_two_sizes_two_methods_with_and_without_lora(): assert len(QWEN) == 8


@each(CONFIGS)
def test_loads(path):
    values = read_settings(path)
    config = settings(RunConfig, values)
    assert {k: getattr(config, k) for k in values} == values and config.recipe().name == config.method


@each(QWEN)
def test_is_what_its_name_says(path):
    c = settings(RunConfig, read_settings(path))
    assert path.stem.startswith(c.model.split("/")[1].lower()) and c.method in path.stem.split("-")
    assert (c.lora_rank > 0) == c.vllm == path.stem.endswith("-lora")
    assert (c.recipe().keep is None) == (c.method == "grpo")


@each(QWEN)
def test_the_paper(path):
    c = settings(RunConfig, read_settings(path))
    assert (c.questions, c.group_size, c.questions // c.updates, c.temperature, c.kl, c.validation_size,
            c.validation_samples) == (128, 8, 64, 1, 0, 240, 16)
    assert c.steps == (600 if "1.5b" in path.stem else 400) and (c.lora_rank or c.lr == 1e-6)
    if c.method == "capo": assert (c.tau, c.ref_low, c.ref_high) == (.6 if "1.5b" in path.stem else .5, 1.05, 2.5)


def test_a_misspelt_key_is_refused():
    with pytest.raises(ValueError, match="did you mean group_size"):
        settings(RunConfig, read_settings(QWEN[0]) | {"groupsize": 8})
