"Every file under configs/ is a run that the library accepts, and says of itself what its name says."
from pathlib import Path

import pytest

from capo.train import RunConfig, read_settings, settings

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
each_file = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)


def test_there_are_some(): assert len(CONFIGS) == 8


@each_file
def test_is_what_its_name_says(path):
    values = read_settings(path)
    config = settings(RunConfig, values)
    assert {k: getattr(config, k) for k in values} == values
    assert path.stem.startswith(config.model.split("/")[1].lower()) and config.method in path.stem.split("-")
    assert (config.lora_rank > 0) == config.vllm == path.stem.endswith("-lora")
    assert config.recipe().name == config.method and (config.recipe().keep is None) == (config.method == "grpo")


@each_file
def test_the_paper(path):
    c = settings(RunConfig, read_settings(path))
    assert (c.questions, c.group_size, c.questions // c.updates, c.temperature, c.kl, c.validation_size, c.validation_samples) == (128, 8, 64, 1, 0, 240, 16)
    assert c.steps == (600 if "1.5b" in path.stem else 400) and (c.lora_rank or c.lr == 1e-6)
    if c.method == "capo": assert (c.tau, c.ref_low, c.ref_high) == (.6 if "1.5b" in path.stem else .5, 1.05, 2.5)


def test_a_misspelt_key_is_refused():
    with pytest.raises(ValueError, match="did you mean group_size"): settings(RunConfig, read_settings(CONFIGS[0]) | {"groupsize": 8})
