"""The demo's models: the host's classes, written and read again."""

import numpy as np
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from PIL import Image
from tune_a_video.demo import model, world
from tune_a_video.lab import classifier, fit_previews, networks
from tune_a_video.tav_core import host
from tune_a_video.tav_core.method import metrics


@pytest.fixture(scope="module")
def vocabulary():
    return networks.Vocabulary(world.captions())


@pytest.fixture(scope="module")
def trained(vocabulary):
    torch.manual_seed(0)
    return networks.new_unet(), networks.new_text_encoder(len(vocabulary)), networks.new_vae()


@pytest.fixture(scope="module")
def loaded(trained, vocabulary, tmp_path_factory):
    file = tmp_path_factory.mktemp("demo") / "model.safetensors"
    unet, text, vae = trained
    networks.save(unet, text, vocabulary.ids, vae, file, {"steps": "0"})
    assert file.stat().st_size <= 16_000_000
    return model.load(file)


def test_unknown_words_share_a_row(vocabulary):
    known, unknown = vocabulary.rows(["a red car", "a zebra car"])
    assert known.shape == (77,)
    assert (known[:4] != unknown[:4]).tolist() == [False, False, True, False]
    assert unknown[2] == len(vocabulary) - 1


def test_the_loaded_text_encoder_is_the_trained_one(trained, loaded, vocabulary):
    _, clip, _ = loaded
    captions = ["a red car on the beach, pencil sketch", "a zebra", ""]
    context = networks.encode_text(trained[1], vocabulary.rows(captions))
    for caption, expected in zip(captions, context, strict=True):
        actual = clip.encode_from_tokens(clip.tokenize(caption))[0]
        assert torch.allclose(actual, expected, atol=5e-3)


def test_training_reaches_the_text_encoder(trained, vocabulary):
    unet, text, _ = trained
    torch.nn.init.normal_(unet.out[-1].weight)
    for block in unet.modules():
        if isinstance(block, networks.SpatialTransformer):
            torch.nn.init.normal_(block.proj_out.weight)
    context = networks.encode_text(text, vocabulary.rows(["a dog"]))
    unet(
        torch.randn(1, 4, 16, 16), torch.ones(1), context=context, transformer_options=networks.DIFFERENTIABLE
    ).sum().backward()
    assert text.text_model.embeddings.token_embedding.weight.grad.abs().max() > 0
    assert text.text_model.encoder.layers[0].mlp.fc1.weight.grad.abs().max() > 0


def test_attention_is_the_hosts():
    q, k, v = torch.randn(3, 2, 5, 8).unbind()
    expected = networks.attention_basic(q, k, v, 2)
    assert torch.allclose(networks.DIFFERENTIABLE[host.OVERRIDE](None, q, k, v, 2), expected, atol=1e-6)


def test_the_loaded_model_samples(loaded):
    import comfy.sample

    model, clip, vae = loaded
    text = [[clip.encode_from_tokens(clip.tokenize("a dog")), {}]]
    latents = torch.zeros(1, 4, 16, 16)
    noise = comfy.sample.prepare_noise(latents, 0)
    sampler = ("ddim", "ddim_uniform")
    samples = comfy.sample.sample(model, noise, 2, 5.0, *sampler, text, text, latents, disable_pbar=True, seed=0)
    assert vae.decode(samples).shape == (1, 128, 128, 3)
    assert vae.encode(torch.rand(1, 128, 128, 3)).shape == latents.shape


@pytest.fixture(scope="module")
def shipped():
    return model.load()


@pytest.mark.parametrize("method", LatentPreviewMethod)
def test_previews_are_in_the_worlds_colours(shipped, method, monkeypatch):
    """Whatever the host is set to; by Stable Diffusion's factors the red car would be white."""
    monkeypatch.setattr(args, "preview_method", method)
    scene = world.Scene("red car", "beach")
    with torch.inference_mode():
        latents = shipped[2].encode(torch.from_numpy(world.render(scene))[None].float() / 255)
        [picture] = host.pictures_of(shipped[0], latents)
    wanted = Image.fromarray(world.render(scene)).resize(picture.size, Image.Resampling.BOX)
    seen, wanted = (torch.from_numpy(np.array(shown)).float()[None] / 255 for shown in (picture, wanted))
    assert metrics.psnr(seen, wanted) > 20


def test_the_colours_of_previews_are_the_fitted_ones(shipped):
    """After another training, lab/fit_previews.py says which they are."""
    latents, colours = fit_previews.latents_and_colours(shipped[2], fit_previews.HELD_OUT, 16)
    best = fit_previews.error(latents, colours, fit_previews.fit(latents, colours))
    kept = fit_previews.error(latents, colours, torch.tensor([*model.COLOURS, model.COLOURS_BIAS]))
    assert kept > best - 0.5


def test_nothing_but_previews_changes(shipped):
    plain = host.build_model(model.UNET, shipped[0].model.diffusion_model.state_dict())
    latent, own = networks.LatentFormatSD15(), shipped[0].model.latent_format
    assert plain.model.latent_format.latent_rgb_factors == latent.latent_rgb_factors  # another MODEL keeps its own
    assert {name for name, value in vars(own).items() if value != getattr(latent, name)} == {
        *("latent_rgb_factors", "latent_rgb_factors_bias", "taesd_decoder_name")
    }
    some = torch.randn(2, 4, 8, 8)
    assert torch.equal(own.process_in(some), latent.process_in(some))
    assert torch.equal(own.process_out(some), latent.process_out(some))
    assert host.fingerprint(plain) == host.fingerprint(shipped[0])


def test_the_classifier_is_read_as_written(tmp_path):
    network = classifier.Classifier()
    classifier.save(network, tmp_path / "c.safetensors", {})
    seen = classifier.load(tmp_path / "c.safetensors")(torch.rand(2, 3, 128, 128))
    assert len(seen.labels()) == 2 and seen.labels()[0][1] in world.BACKGROUNDS
    assert seen.place.shape == (2, 2) and seen.place.min() >= 0 and seen.place.max() <= 1


def test_the_centre_of_a_peak():
    heat = torch.full((1, 1, 4, 8), -50.0)
    heat[0, 0, 1, 6] = 0
    assert torch.allclose(classifier.centre(heat), torch.tensor([[6.5 / 8, 1.5 / 4]]))
