"""An exact denoiser (a Gaussian mixture in the plane), small random UNets and pipelines: nothing is downloaded."""

import json
import math
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from hypothesis import settings
from PIL import Image

settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


class GaussianMixture:
    """
    Data Σ_k p_k N(μ_k, s²) in the plane, whose denoiser is known in closed form: x_t is Σ_k p_k N(α μ_k, α² s² + σ²).

    Everything is float64 and given (α, σ) or λ instead of a timestep, so that no rounding of times comes in.
    """

    means = torch.tensor([[1.2, 0.3], [-0.7, 1.0], [-0.4, -1.1]], dtype=torch.float64)
    probabilities = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    std = 0.4

    def noise_prediction(self, sample: torch.Tensor, alpha, sigma) -> torch.Tensor:
        """ε = −σ ∇ log p_t(x)."""
        variance = alpha**2 * self.std**2 + sigma**2
        offsets = sample[:, None] - alpha * self.means
        logits = self.probabilities.log() - (offsets**2).sum(-1) / (2 * variance)
        return sigma * (logits.softmax(-1)[..., None] * offsets).sum(1) / variance

    def noise_prediction_at(self, sample: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """The same, as a differentiable function of λ: α² = 1/(1 + e^{−2λ})."""
        alpha, sigma = torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()
        return self.noise_prediction(sample, alpha, sigma)

    def slope(self, sample: torch.Tensor, noise_prediction: torch.Tensor, log_snr: float) -> torch.Tensor:
        """dε/dλ along dx/dλ = σ² x − σ ε, by forward-mode differentiation."""
        log_snr = torch.tensor(log_snr, dtype=torch.float64)
        sigma = torch.sigmoid(-2 * log_snr).sqrt()
        velocity = sigma**2 * sample - sigma * noise_prediction
        point, direction = (sample, log_snr), (velocity, torch.ones_like(log_snr))
        return torch.func.jvp(self.noise_prediction_at, point, direction)[1]


@pytest.fixture(scope="session")
def mixture() -> GaussianMixture:
    return GaussianMixture()


@pytest.fixture(scope="session")
def slope_source(mixture):
    """Builds the exact slope source of the mixture for a scheduler; it records the keyword arguments of its calls."""

    def build(scheduler):
        def source(sample, noise_prediction, timestep, **kwargs):
            source.calls.append(kwargs)
            # The scheduler's own float64 λ: a timestep that went through float32 is not exact enough.
            log_snr = float(scheduler.lambdas[scheduler.step_index])
            return mixture.slope(sample, noise_prediction, log_snr)

        source.calls = []
        return source

    return build


@pytest.fixture(scope="session")
def run(mixture):
    """Samples with the exact denoiser in the scheduler's `prediction_type`, the way a pipeline does."""

    def run(scheduler, sample: torch.Tensor) -> torch.Tensor:
        for index, timestep in enumerate(scheduler.timesteps):
            gamma = float(scheduler.sigmas[index])
            alpha = 1 / math.sqrt(1 + gamma**2)
            sigma = gamma * alpha
            noise = mixture.noise_prediction(sample, alpha, sigma)
            data = (sample - sigma * noise) / alpha
            model_output = {"epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data}
            sample = scheduler.step(model_output[scheduler.config.prediction_type], timestep, sample).prev_sample
        return sample

    return run


@pytest.fixture(scope="session")
def noise():
    """Standard normal noise in float64 from a seed."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return draw


@pytest.fixture
def unet():
    """Builds a class-conditional `UNet2DModel` with attention and random weights, in float64 and eval mode."""

    def build(seed: int = 0, **config) -> UNet2DModel:
        defaults = {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "num_class_embeds": 4,
        }
        return _random_model(UNet2DModel, {**defaults, **config}, seed)

    return build


@pytest.fixture
def text_unet():
    """Builds a `UNet2DConditionModel` with cross-attention and random weights, in float64 and eval mode."""

    def build(seed: int = 0, **config) -> UNet2DConditionModel:
        defaults = {
            "sample_size": 8,
            "in_channels": 2,
            "out_channels": 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
        }
        return _random_model(UNet2DConditionModel, {**defaults, **config}, seed)

    return build


def _random_model(cls, config: dict, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(**config).double().eval()


@pytest.fixture(scope="session")
def like_trained():
    """
    Gives random weights two properties of trained ones: the output changes slowly with the timestep (the fast half of
    the sinusoids is cut off), and visibly with the sample.
    """

    def change(unet):
        weight = unet.time_embedding.linear_1.weight.data
        weight.unflatten(1, (2, 2, -1))[:, :, 0] = 0  # cosines and sines, each from fast to slow
        unet.conv_out.weight.data *= 3
        return unet.eval()

    return change


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = list(string.ascii_lowercase)
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["ca", "cat</w>"]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


@pytest.fixture(scope="session")
def make_stable_diffusion(tokenizer, like_trained):
    """
    Any pipeline of Stable Diffusion 1.x, 2.x or XL, ControlNet and upscaling included:
    `make_stable_diffusion(StableDiffusionImg2ImgPipeline)`.
    """

    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def make(pipeline_class=StableDiffusionPipeline, unet_channels=4, scheduler=None):
        torch.manual_seed(0)
        name = pipeline_class.__name__
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        options = {"cross_attention_dim": 16}
        components = {"text_encoder": CLIPTextModel(text_config).eval(), "tokenizer": tokenizer}
        if "XL" in name:
            components |= {"text_encoder_2": CLIPTextModelWithProjection(text_config).eval()}
            components |= {"tokenizer_2": tokenizer}
            options = {"cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
            options |= {"projection_class_embeddings_input_dim": 16 + 6 * 8}
        else:
            components |= {"safety_checker": None, "feature_extractor": None}
        if "Upscale" in name:
            components |= {"low_res_scheduler": DDPMScheduler()}
            options |= {"num_class_embeds": 1000}
        elif "XL" not in name:
            components |= {"requires_safety_checker": False}
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=unet_channels,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=4,
            **options,
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        if "ControlNet" in name:
            control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
            for block in (*control.controlnet_down_blocks, control.controlnet_mid_block):
                torch.nn.init.normal_(block.weight, std=0.1)  # zero in a new one
            components |= {"controlnet": control.eval()}
        if scheduler is None:  # as in the published checkpoints
            scheduler = DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            )
        pipe = pipeline_class(vae=vae.eval(), unet=like_trained(unet), scheduler=scheduler, **components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A data set of 16x12 pictures in the Hub's parquet layout."""
    import datasets

    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)) for _ in range(40)]
    labels = [i % 3 for i in range(40)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(
        folder / "train-00000-of-00001.parquet"
    )
    return folder


@pytest.fixture(scope="session")
def captioned_data(tmp_path_factory) -> Path:
    """A folder of 20x16 pictures with captions, as `datasets` and the Hub know it."""
    folder = tmp_path_factory.mktemp("data") / "captioned"
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = ["a cat", "a dog on a mat", "cats", "the sea", "a b c", ""] * 4
    lines = []
    for i, caption in enumerate(captions):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize((20, 16)).save(folder / f"{i:02}.png")
        lines.append(json.dumps({"file_name": f"{i:02}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_base(make_stable_diffusion, tmp_path_factory):
    """A text-to-image checkpoint in the layout of the Hub: `make_base(StableDiffusionInpaintPipeline, 9)`."""

    def make(pipeline_class=StableDiffusionPipeline, unet_channels=4, scheduler=None) -> Path:
        folder = tmp_path_factory.mktemp("base") / "model"
        make_stable_diffusion(pipeline_class, unet_channels, scheduler).save_pretrained(folder)
        return folder

    return make
