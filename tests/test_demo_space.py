"""The demo without a browser: which uploads it accepts, what it says about a model, and whether its folder is a valid
Space."""

import io
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import MAKE_CONFIG, NUM_CLS_TOKENS, PATIENCE, TOKEN_PRUNING
from packaging.requirements import Requirement
from PIL import Image, PngImagePlugin
from transformers import AutoModelForImageClassification

from hf_vssm_prune import EXAMPLE_MODEL
from hf_vssm_prune.flops import count_flops
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.training.data import load_evaluation_dataset


ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
sys.path.insert(0, str(DEMO))

from pruned_model import PrunedModel  # noqa: E402
from uploads import MAX_BYTES, MAX_PIXELS, open_upload  # noqa: E402


# ---- Uploads


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_upload_is_opened_upright_whatever_its_name(format, tmp_path) -> None:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[:, :15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    file = tmp_path / "photo.bin"
    Image.fromarray(pixels).save(file, format, exif=exif)
    image = open_upload(str(file))
    assert (image.mode, image.size) == ("RGB", (20, 30))
    assert min(image.getpixel((10, 3))) > 250
    assert max(image.getpixel((10, 26))) < 5


def png_that_claims(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims any size."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    stream = io.BytesIO()
    stream.write(b"\x89PNG\r\n\x1a\n")
    for name, data in chunks:
        PngImagePlugin.putchunk(stream, name, data)
    return stream.getvalue()


def encoded(format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, format)
    return stream.getvalue()


def jpeg_of_many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    stream = io.BytesIO()
    Image.new("RGB", (80, 80)).save(stream, "JPEG", progressive=True)
    content = stream.getvalue()
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + 300 * content[start:end] + content[end:]


BAD_UPLOADS = {
    "large.jpg": (lambda: encoded("JPEG") + bytes(MAX_BYTES), "large.jpg is larger than 10 MB"),
    "wide.png": (lambda: png_that_claims(MAX_PIXELS + 1, 1), f"has {MAX_PIXELS + 1} × 1 pixels; at most 30 million"),
    "strip.png": (lambda: png_that_claims(1500, 1), "strip.png is 1500 × 1: at most 20 times as long as wide"),
    "bomb.png": (lambda: png_that_claims(60_000, 60_000), "bomb.png has too many pixels; at most 30 million"),
    "cut.png": (lambda: png_that_claims(100, 100), "cut.png cannot be read"),
    "empty.png": (lambda: b"", "empty.png is not an image that can be read: JPEG, PNG and WebP are"),
    "scans.jpg": (jpeg_of_many_scans, "scans.jpg has more than 300 scans and other segments"),
    "page.png": (lambda: b"<svg onload='alert(1)'></svg>", "page.png is not an image"),
    "other.png": (lambda: encoded("BMP"), "other.png is not an image"),
    "animation.png": (lambda: encoded("GIF"), "animation.png is not an image"),
}


def test_a_photo_with_a_second_picture_in_it_is_a_jpeg(tmp_path) -> None:
    """Phones store another one in the same file, for instance of depth; Pillow calls this MPO."""
    second = [Image.new("L", (4, 4))]
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=second)
    assert Image.open(tmp_path / "photo.jpg").format == "MPO"
    assert open_upload(str(tmp_path / "photo.jpg")).size == (30, 20)


def test_a_jpeg_may_be_progressive_and_followed_by_a_video(tmp_path) -> None:
    """Phones append the seconds around a photo, in which there are any bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95, progressive=True, icc_profile=bytes(70_000))
    with (tmp_path / "photo.jpg").open("ab") as file:
        file.write(1000 * b"\xff\xda\x00\x02")
    assert open_upload(str(tmp_path / "photo.jpg")).size == (400, 300)


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused_by_name(name, tmp_path) -> None:
    content, message = BAD_UPLOADS[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=message):
        open_upload(str(tmp_path / name))


# ---- The model

OWN = "As this model was saved (top)"


@pytest.fixture(scope="module", params=sorted(MAKE_CONFIG))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PrunedModel:
    """Each family in turn, saved with its own schedule, and with labels that must be escaped in HTML."""
    pruning = {**TOKEN_PRUNING, "importance": "l2", "alignment": "none"}
    sizes = {"hidden_size": 32, "num_hidden_layers": 8}
    if request.param == "plainmamba":
        sizes["stem_channels"] = 8  # which no pruning makes cheaper
    labels = {0: "<b>", 1: "a & b", 2: "c"}
    config = MAKE_CONFIG[request.param](token_pruning=pruning, id2label=labels, **sizes)
    processor = new_image_processor(config, [0.5] * 3, [0.5] * 3, crop_pct=1.0)
    folder = tmp_path_factory.mktemp("model") / request.param
    return PrunedModel(str(save_for_hub(AutoModelForImageClassification.from_config(config), folder, processor)))


def test_a_classification_is_the_models(model) -> None:
    pixel_values = model.prepare(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    )
    classification = model.classify(pixel_values, 30, OWN)
    flops = count_flops(model.model.config)
    assert classification.flops == flops
    assert flops.reduction == pytest.approx(0.30, abs=0.005)
    pruning = model.model.config.token_pruning
    assert (pruning["importance"], pruning["alignment"]) == ("l2", "none")
    assert classification.layers == pruning["layers"]
    with torch.no_grad():
        output = model.model(pixel_values)
        shares = output.logits[0].softmax(-1)
        model.model.set_token_pruning(None)
        dense = model.model(pixel_values).logits[0].softmax(-1)
    for guesses, expected in ((classification.pruned, shares), (classification.dense, dense)):
        assert dict(guesses) == pytest.approx(
            dict(zip(("<b>", "a & b", "c"), expected.tolist(), strict=True)), abs=1e-5
        )
        assert guesses == sorted(guesses, key=lambda guess: -guess[1])
    class_tokens = NUM_CLS_TOKENS[model.model.config.model_type]
    assert classification.num_kept == [ids.shape[1] - class_tokens for ids in output.kept_tokens]
    assert len(classification.panels) == 1 + len(classification.layers)


def test_methods_are_those_that_they_say(model) -> None:
    pixel_values = model.prepare(Image.new("RGB", (40, 50)))
    chosen = {}
    for method in model.methods:
        model.classify(pixel_values, 30, method)
        pruning = model.model.config.token_pruning
        chosen[method] = (pruning["method"], pruning.get("importance"), pruning["alignment"])
    assert list(chosen.values()) == [
        ("top", "l2", "none"),
        ("local_merge", None, "none"),
        ("top", "clip", "repeat"),
        ("top", "random", "repeat"),
    ]


def test_flops_are_those_of_the_scan_directions_that_ran(tmp_path) -> None:
    pruning = {"layers": [2, 4], "keep_ratios": [0.7, 0.7], "method": "dyvm", "block_keep_ratio": 0.6}
    config = MAKE_CONFIG["vim"](token_pruning=pruning, hidden_size=32, num_hidden_layers=8)
    classifier = AutoModelForImageClassification.from_config(config)
    processor = new_image_processor(config, [0.5] * 3, [0.5] * 3, crop_pct=1.0)
    model = PrunedModel(str(save_for_hub(classifier, tmp_path / "m", processor)))
    pixel_values = model.prepare(Image.new("RGB", (40, 50)))
    classification = model.classify(pixel_values, 40, "As this model was saved (dyvm)")
    assert classification.layers == [2, 4], "only there are predictors that were trained"
    with torch.no_grad():
        gates = model.model(pixel_values, output_block_gates=True).block_gates
    ran = torch.stack(list(gates)).mean().item()
    assert ran != pytest.approx(0.6, abs=0.01)
    assert classification.flops == count_flops(model.model.config, block_fraction=ran)


def test_a_model_of_grey_images_sees_grey_images(tmp_path) -> None:
    classifier = AutoModelForImageClassification.from_config(MAKE_CONFIG["vim"](num_channels=1, num_hidden_layers=8))
    processor = new_image_processor(classifier.config, [0.5], [0.5], crop_pct=1.0)
    model = PrunedModel(str(save_for_hub(classifier, tmp_path / "m", processor)))
    classification = model.classify(model.prepare(Image.new("RGB", (40, 50))), 30, next(iter(model.methods)))
    assert len(classification.panels) == 1 + len(classification.layers)


def test_without_a_budget_nothing_is_dropped(model) -> None:
    classification = model.classify(model.prepare(Image.new("RGB", (40, 50))), 0, OWN)
    assert classification.pruned == classification.dense
    assert classification.flops.reduction == 0
    assert (len(classification.panels), classification.num_kept) == (1, [])


def test_dense_and_pruned_are_timed_in_turns(model, monkeypatch) -> None:
    pixel_values = model.prepare(Image.new("RGB", (40, 50)))
    schedules = []
    run = type(model)._seconds
    monkeypatch.setattr(
        type(model), "_seconds", lambda self, batch, schedule: schedules.append(schedule) or run(self, batch, schedule)
    )
    *_, measurement = model.measure(pixel_values, 30, OWN)
    assert measurement.batch_size == 8
    assert measurement.turns >= 5
    assert [schedule is None for schedule in schedules] == [True, False] * measurement.turns
    assert measurement.dense > 0
    assert measurement.pruned > 0


# ---- The page


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("gradio")
    import app

    return app


def test_labels_are_text_not_html(app, model) -> None:
    html = app.result(model.classify(model.prepare(Image.new("RGB", (40, 50))), 30, OWN), None)
    assert "&lt;b&gt;" in html
    assert "a &amp; b" in html
    assert "<b>" not in html


def test_what_the_browser_sends_is_checked(app, model) -> None:
    page = app.Page(model)
    for name in ("../../app", "bag", None, 3):
        with pytest.raises(app.gr.Error, match="There is no example"):
            page.choose_example(app.Session(), 1, 30, OWN, name)
    session = app.Session()
    page.choose_example(session, 1, 30, OWN, "cat")
    with pytest.raises(app.gr.Error, match="There is no method 'all'; the methods are As this model was saved"):
        page.show(session, 1, 30, "all")
    with pytest.raises(app.gr.Error, match=r"`flops_reduction` is 0\.99"):
        page.show(session, 2, 99, OWN)


def test_a_model_that_sorts_waste_gets_pictures_of_waste(app) -> None:
    """Also if it was fine-tuned, or is named instead of given as a folder."""
    labels = ["trash", "plastic", "paper", "metal", "glass", "cardboard"]
    assert app.Page(SimpleNamespace(labels=labels)).examples == app.WASTE
    assert app.Page(SimpleNamespace(labels=labels[1:])).examples == app.PHOTOS


def test_a_model_that_is_not_there_is_named(app, tmp_path, capsys) -> None:
    assert app.main(["--model_name_or_path", str(tmp_path / "nothing")]) == 1
    assert f"error: {tmp_path / 'nothing'} cannot be opened" in capsys.readouterr().err


def test_a_variable_that_is_set_to_nothing_names_no_model(app, monkeypatch, capsys) -> None:
    def refuse(name: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(app, "PrunedModel", refuse)
    monkeypatch.setenv("HF_VSSM_PRUNE_DEMO_MODEL", "")
    assert app.main([]) == 1
    assert capsys.readouterr().err == f"error: {EXAMPLE_MODEL}\n"


def test_a_photo_of_a_phone_takes_not_much_longer_than_decoding_it(app, tmp_path) -> None:
    """Both in turns: CPU times depend on the machine and on what else it does, but their ratio, about 7, hardly."""
    noise = np.random.default_rng(0).integers(0, 256, (504, 378, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((3024, 4032)).save(tmp_path / "photo.jpg", quality=90)
    page = app.Page(PrunedModel(str(EXAMPLE_MODEL)))
    method = next(iter(page.model.methods))
    decoding, all_of_it = [], []
    for _ in range(3):
        start = time.process_time()
        with Image.open(tmp_path / "photo.jpg") as image:
            image.load()
        decoding.append(time.process_time() - start)
        start = time.process_time()
        page.upload(app.Session(), 1, 42, method, str(tmp_path / "photo.jpg"))
        all_of_it.append(time.process_time() - start)
    assert min(all_of_it) < 16 * min(decoding)


# The actions of the page are the same for every model.
with_one_model = pytest.mark.parametrize("model", ["plainmamba"], indirect=True)


def fewer(page, session, percent: int) -> str:
    return f"{page.model.classify(session.chosen, percent, OWN).flops.reduction:.1%} fewer"


@with_one_model
def test_the_last_choice_is_shown_even_if_an_earlier_one_takes_longer(app, model, tmp_path) -> None:
    session = app.Session()

    def open_slowly(file: str) -> Image.Image:
        page.choose_example(session, 2, 30, OWN, "cat")
        return Image.new("RGB", (40, 50))

    page = app.Page(model, lambda file: open_slowly(file) if file == "slow.png" else open_upload(file))
    assert page.upload(session, 1, 30, OWN, "slow.png") == app.gr.skip()
    assert session.shown.chosen.std() > 0.1, "not the grey image"


@with_one_model
def test_the_last_request_counts_even_if_it_arrives_first(app, model) -> None:
    page, session = app.Page(model), app.Session()
    page.choose_example(session, 2, 30, OWN, "cat")
    chosen = session.chosen
    assert page.choose_first(session, 1, 30, OWN) == app.gr.skip()
    assert session.chosen is chosen
    assert fewer(page, session, 40) in page.show(session, 4, 40, OWN)
    assert page.show(session, 3, 20, OWN) == app.gr.skip()
    assert session.shown.how == (40, OWN)


@with_one_model
def test_what_was_classified_is_not_shown_after_another_choice(app, model, monkeypatch) -> None:
    page, session = app.Page(model), app.Session()
    page.choose_first(session, 1, 30, OWN)
    classify, calls = model.classify, []

    def choose_meanwhile(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            page.choose_example(session, 3, 30, OWN, "cat")
        return classify(*arguments)

    monkeypatch.setattr(model, "classify", choose_meanwhile)
    assert page.show(session, 2, 40, OWN) == app.gr.skip()
    assert session.shown.how == (30, OWN)
    assert fewer(page, session, 40) in page.add_times(session, 40, OWN), "the budget is the slider's after all"


@with_one_model
def test_a_budget_chosen_while_a_file_is_opened_is_used(app, model) -> None:
    session = app.Session()

    def open_while_the_slider_moves(file: str) -> Image.Image:
        if session.chosen is not None:
            page.show(session, 3, 40, OWN)
        return open_upload(file)

    page = app.Page(model, open_while_the_slider_moves)
    page.choose_first(session, 1, 30, OWN)
    assert fewer(page, session, 30) in page.choose_example(session, 2, 30, OWN, "cat")
    assert fewer(page, session, 40) in page.add_times(session, 40, OWN)


@with_one_model
def test_times_are_those_of_the_budget_that_is_shown(app, model, monkeypatch) -> None:
    """While the slider moves, it is further than the result."""
    page, session, measured = app.Page(model), app.Session(), []
    page.choose_first(session, 1, 30, OWN)
    measure = PrunedModel.measure
    monkeypatch.setattr(model, "measure", lambda *given: measured.append(given[1:]) or measure(model, *given))
    assert fewer(page, session, 30) in page.add_times(session, 40, OWN)
    assert measured == [(30, OWN)]


@with_one_model
def test_the_server_limits_visitors_and_requests_that_it_remembers(app, model, monkeypatch) -> None:
    launched = {}
    monkeypatch.setattr(app, "PrunedModel", lambda _: model)
    monkeypatch.setattr(app.gr.Blocks, "launch", lambda blocks, **options: launched.update(options, blocks=blocks))
    assert app.main([]) == 0
    assert launched["state_session_capacity"] == app.MOST_VISITORS
    assert launched["blocks"]._queue.max_size == app.MOST_WAITING


@with_one_model
def test_a_result_is_read_out(app, model) -> None:
    html = app.result(model.classify(model.prepare(Image.new("RGB", (40, 50))), 30, OWN), None)
    assert html.startswith('<p class="spoken" role="status">Dense: ')


def test_times_are_not_measured_for_what_is_no_longer_shown(app, model, monkeypatch) -> None:
    page, session = app.Page(model), app.Session()
    page.choose_example(session, 1, 30, OWN, "cat")
    turns = []

    def move_the_slider_meanwhile(*arguments):
        for measurement in PrunedModel.measure(model, *arguments):
            turns.append(measurement)
            if len(turns) == 2:
                page.show(session, 2, 40, OWN)
            yield measurement

    monkeypatch.setattr(model, "measure", move_the_slider_meanwhile)
    assert page.add_times(session, 30, OWN) == app.gr.skip()
    assert len(turns) == 2
    assert "times as fast" in page.add_times(session, 40, OWN)


# ---- The Space


def test_waste_is_the_test_images_that_their_list_names() -> None:
    dataset, label_names = load_evaluation_dataset("trashnet")
    rows = [line.split("|")[1:4] for line in (DEMO / "examples" / "SOURCES.md").read_text().splitlines()]
    listed = [[cell.strip(" `") for cell in row] for row in rows if row and "waste/" in row[0]]
    assert len(listed) == 12
    for file, label, row in listed:
        stored = dataset[int(row)]
        assert (DEMO / "examples" / file).read_bytes() == stored["image"]["bytes"]
        assert label == label_names[stored["label"]]


def test_every_example_has_a_source() -> None:
    sources = (DEMO / "examples" / "SOURCES.md").read_text()
    files = [file for folder in ("photos", "waste") for file in (DEMO / "examples" / folder).iterdir()]
    assert len(files) == 16
    for file in files:
        assert f"`{file.parent.name}/{file.name}`" in sources
        with Image.open(file) as image:
            image.load()
            assert file.stat().st_size < 50_000


def test_the_space_installs_what_the_package_needs() -> None:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (DEMO / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        *project["dependencies"],
        *project["optional-dependencies"]["video"],
    ]
    _, front_matter, _ = (DEMO / "README.md").read_text().split("---\n", 2)
    space = yaml.safe_load(front_matter)
    assert space["sdk"] == "gradio"
    (gradio,) = map(Requirement, project["optional-dependencies"]["demo"])
    assert gradio.name == "gradio"
    assert space["sdk_version"] in gradio.specifier
    assert Requirement(f"python{project['requires-python']}").specifier.contains(space["python_version"])
    assert (DEMO / space["app_file"]).is_file()
    assert len(space["short_description"]) <= 60


def test_the_space_has_its_own_package(tmp_path) -> None:
    subprocess.run(["make", "--silent", "space", f"SPACE={tmp_path}"], cwd=ROOT, check=True)
    assert not (tmp_path / "web").exists(), "another page"
    (tmp_path / "which.py").write_text("import pruned_model, hf_vssm_prune; print(hf_vssm_prune.EXAMPLE_MODEL)")
    command = [sys.executable, str(tmp_path / "which.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True, cwd="/")
    assert result.stdout.strip() == str(tmp_path / "hf_vssm_prune" / "data" / EXAMPLE_MODEL.name)
