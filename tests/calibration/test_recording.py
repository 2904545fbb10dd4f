"""What a pipeline's call does to the inputs it is given."""

from genie_diffusers.calibration.recording import split_inputs


class Pipeline:
    def __call__(self, prompt, negative_prompt=None, prompt_2=None, system_prompt=None, image=None, generator=None):
        """What split_inputs reads the names of inputs from."""


def test_a_call_that_writes_into_its_prompts_finds_the_same_ones_the_next_time():
    prompts = ["a cat", "a dog"]
    _, (batch,) = split_inputs(Pipeline(), {"prompt": prompts}, None, 0, None)
    for _ in range(2):
        call = batch.inputs
        assert call["prompt"] == ["a cat", "a dog"]
        call["prompt"][0] = "user: a cat"  # as Z-Image does
    assert prompts == ["a cat", "a dog"]


def test_texts_that_are_one_for_all_paths_stay_as_they_are():
    texts = {"negative_prompt": "blurry", "prompt_2": "a pet", "system_prompt": "You are an assistant."}
    count, (batch,) = split_inputs(Pipeline(), {"prompt": ["a cat", "a dog"], **texts}, None, 0, None)
    assert count == 2
    assert batch.inputs["system_prompt"] == texts["system_prompt"]
    assert batch.inputs["negative_prompt"] == ["blurry"] * 2 and batch.inputs["prompt_2"] == ["a pet"] * 2


def test_pictures_that_all_paths_share_reach_the_call_as_a_list():
    for size in (None, 1):
        _, batches = split_inputs(Pipeline(), {"prompt": ["a cat", "a dog"], "image": ("one", "two")}, None, 0, size)
        assert all(batch.inputs["image"] == ["one", "two"] for batch in batches)
    _, batches = split_inputs(Pipeline(), {"prompt": ["a cat", "a dog"], "image": ["one", "two"]}, None, 0, 1)
    assert [batch.inputs["image"] for batch in batches] == [["one"], ["two"]]


def test_scales_of_two_models_are_used_in_turn_together():
    class Pipeline:
        def __call__(self, prompt, guidance_scale=4.0, guidance_scale_2=None, generator=None):
            """Of Wan 2.2, whose second transformer has a scale of its own."""

    inputs = {"prompt": ["a", "b", "c"], "guidance_scale": [4.0, 5.0], "guidance_scale_2": [3.0, 3.5]}
    _, batches = split_inputs(Pipeline(), inputs, None, 0, None)
    found = [(batch.numbers, batch.inputs["guidance_scale"], batch.inputs["guidance_scale_2"]) for batch in batches]
    assert found == [([0, 2], 4.0, 3.0), ([1], 5.0, 3.5)]
