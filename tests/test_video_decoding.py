"""Which frames a clip has, and how good, unusual and broken videos are handled."""

import ctypes
import gc
import io
import logging
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from videos import number_in, numbered_frames, write_video

from hf_vssm_prune.training import video_decoding
from hf_vssm_prune.training.frame_sampling import clips_of, random_frames, segment_frames, uniform_frames
from hf_vssm_prune.training.image_steps import ImageError
from hf_vssm_prune.training.video_decoding import VideoError, decode_frames, read_clip


def frames_at(video: Path | bytes, *numbers: int) -> list[Image.Image]:
    """Frames by index; negative indices count from the end."""
    is_file = isinstance(video, Path)
    stored = {"bytes": None if is_file else video, "path": str(video) if is_file else None}
    return decode_frames(stored, lambda count: [[number % count for number in numbers]], lambda frame: frame, "It")[0]


def count_frames(file: Path) -> int:
    counts = []
    decode_frames(
        {"bytes": None, "path": str(file)}, lambda count: counts.append(count) or [[0]], lambda frame: frame, "It"
    )
    return counts[-1]


# Which frames


def test_frames_by_the_published_rules():
    # Of 300 frames 8: segments of 299 / 8 = 37.375, four clips at fifths of one.
    assert uniform_frames(300, 8, 0, 4) == [7, 44, 82, 119, 157, 194, 231, 269]
    assert uniform_frames(300, 8, 3, 4) == [29, 66, 104, 141, 179, 216, 253, 291]
    # The same of 40 frames in segments of 5, from their beginnings and from their middles.
    assert segment_frames(40, 8, 0, 2) == list(range(0, 40, 5))
    assert segment_frames(40, 8, 1, 2) == segment_frames(40, 8) == [2, 7, 12, 17, 22, 27, 32, 37]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 7, 8, 9, 100, 100_000])
@pytest.mark.parametrize("sampling", ["uniform", "segments"])
def test_every_frame_chosen_is_there_and_in_order(num_frames, sampling):
    clips = clips_of(sampling, num_frames, 8, 3)
    generator = np.random.default_rng(0)
    for clip in [*clips, *(random_frames(num_frames, 8, generator) for _ in range(50))]:
        assert len(clip) == 8
        assert clip == sorted(clip)
        assert clip[0] >= 0
        assert clip[-1] < num_frames


def test_random_frames_are_one_of_each_segment():
    draws = np.array([random_frames(80, 8, np.random.default_rng(seed)) for seed in range(300)])
    for segment, frames in enumerate(draws.T):
        assert set(frames) == set(range(10 * segment, 10 * segment + 10))


# Videos that are right


CODECS = {
    "mp4": {},
    "mkv": {},
    "webm": {"codec": "libvpx-vp9"},
    "avi": {"codec": "mpeg4"},
    "mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "mpg": {"codec": "mpeg2video"},
    "ts": {},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_by_number_in_every_container(suffix, tmp_path):
    count = 90
    write_video(tmp_path / f"video.{suffix}", numbered_frames(count), **CODECS[suffix])
    numbers = [0, 1, 10, 44, 89]
    found = [number_in(frame) for frame in frames_at(tmp_path / f"video.{suffix}", *numbers)]
    assert found == numbers
    content = (tmp_path / f"video.{suffix}").read_bytes()
    assert [each.tobytes() for each in frames_at(content, 5, 80)] == [
        each.tobytes() for each in frames_at(tmp_path / f"video.{suffix}", 5, 80)
    ]


@pytest.mark.parametrize("suffix", CODECS)
def test_jumps_find_the_frames_that_decoding_all_finds(suffix, tmp_path, monkeypatch):
    file = tmp_path / f"video.{suffix}"
    write_video(file, numbered_frames(150), **{**CODECS[suffix], "gop_size": 25})
    numbers = [0, 3, 60, 61, 99, 149]
    calls = []
    by_jumps = video_decoding._by_jumps
    monkeypatch.setattr(video_decoding, "_by_jumps", lambda *given: calls.append(suffix) or by_jumps(*given))
    monkeypatch.setattr(video_decoding, "FEW_FRAMES", 10)
    jumped = frames_at(file, *numbers)
    assert calls
    calls.clear()
    monkeypatch.setattr(video_decoding, "FEW_FRAMES", 1000)
    for frame, other in zip(jumped, frames_at(file, *numbers), strict=True):
        assert frame.tobytes() == other.tobytes()
    assert not calls


def test_a_long_video_is_not_decoded_whole(tmp_path, monkeypatch):
    file = tmp_path / "long.mp4"
    write_video(file, numbered_frames(2000, 32), gop_size=20)
    decoded = []
    by_jumps = video_decoding._by_jumps

    def counted(container, stream, *others):
        class Counting:
            def decode(self, stream):
                for frame in container.decode(stream):
                    decoded.append(frame.pts)
                    yield frame

            seek = container.seek

        return by_jumps(Counting(), stream, *others)

    monkeypatch.setattr(video_decoding, "_by_jumps", counted)
    found = [number_in(frame) for frame in read_clip(file, 8)]
    assert found == uniform_frames(2000, 8)
    assert 8 <= len(decoded) < 500


def peak_growth(act) -> int:
    """Bytes by which this process's memory grows while `act` runs, including buffers of FFmpeg and Pillow."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)  # what earlier tests have freed goes back to the system: reusing it would not count as growth

    def status(line: str) -> int:
        (kilobytes,) = re.findall(rf"^{line}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 1024 * int(kilobytes)

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    except OSError:
        pytest.skip("the peak of this process's memory cannot be reset")
    before = status("VmRSS")
    kept = act()
    growth = status("VmHWM") - before
    del kept
    return growth


def test_memory_is_that_of_the_frames_that_are_kept(tmp_path):
    file = tmp_path / "large.mp4"
    write_video(file, numbered_frames(150, 360, 640), gop_size=60, codec_options={"preset": "ultrafast"})
    all_frames = 150 * 360 * 640 * 3

    def decode(prepare):
        return decode_frames({"bytes": None, "path": str(file)}, lambda count: [list(range(count))], prepare, "It")

    assert peak_growth(lambda: decode(lambda frame: frame.resize((16, 16)))) < all_frames / 2  # FFmpeg's buffers: 30 MB
    assert peak_growth(lambda: decode(lambda frame: frame)) > all_frames * 0.8


def test_one_frame_and_fewer_than_a_clip_has(tmp_path):
    write_video(tmp_path / "one.mp4", numbered_frames(1))
    assert len(read_clip(tmp_path / "one.mp4", 8)) == 8
    write_video(tmp_path / "three.mp4", numbered_frames(3))
    found = [number_in(frame) for frame in read_clip(tmp_path / "three.mp4", 8)]
    assert found == uniform_frames(3, 8)


def test_variable_rates_count_frames_and_not_time(tmp_path):
    times = [0, 40, 80, 3000, 3040, 9000, 9001, 9500, 20000, 20040]
    for suffix in ("mkv", "mp4"):
        file = tmp_path / f"variable.{suffix}"
        write_video(file, numbered_frames(10), times=times)
        assert [number_in(frame) for frame in frames_at(file, *range(10))] == list(range(10))


def test_444_and_ten_bits_have_their_colours(tmp_path):
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, :32], halves[:, 32:] = (200, 30, 30), (30, 60, 200)
    for name, options in {
        "444": {"pix_fmt": "yuv444p"},
        "422": {"pix_fmt": "yuv422p"},
        "10 bits": {"codec": "libx265", "pix_fmt": "yuv420p10le", "codec_options": {"x265-params": "log-level=none"}},
        "grey": {"codec": "ffv1", "pix_fmt": "gray"},
        "rgb": {"codec": "ffv1", "pix_fmt": "bgr0"},
        "bt709": {"colorspace": 1, "color_range": 1},
    }.items():
        file = tmp_path / f"{name}.mkv"
        write_video(file, [halves] * 3, **options)
        pixels = np.asarray(frames_at(file, 1)[0]).astype(int)
        expected = halves[0, [8, 56]].astype(int)
        if name == "grey":
            expected = np.array(Image.fromarray(halves).convert("L").convert("RGB"))[0, [8, 56]].astype(int)
        np.testing.assert_allclose(pixels[16, [8, 56]], expected, atol=12, err_msg=name)


@pytest.mark.parametrize(("kind", "transfer", "code"), [("PQ", "smpte2084", 16), ("HLG", "arib-std-b67", 18)])
def test_hdr_is_named(kind, transfer, code, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(video_decoding, "_said_to_be_hdr", [])
    options = {"codec": "libx265", "pix_fmt": "yuv420p10le", "color_trc": code, "colorspace": 9, "color_primaries": 9}
    parameters = f"log-level=none:transfer={transfer}:colorprim=bt2020:colormatrix=bt2020nc"
    write_video(tmp_path / "hdr.mp4", numbered_frames(3), codec_options={"x265-params": parameters}, **options)
    with caplog.at_level(logging.WARNING):
        read_clip(tmp_path / "hdr.mp4", 3)
        read_clip(tmp_path / "hdr.mp4", 3)
    assert [record.message for record in caplog.records if "is HDR" in record.message] == [
        f"The video '{tmp_path / 'hdr.mp4'}' is HDR ({kind}): there is no tone mapping, so it looks flat to the model."
    ]


def test_pixels_that_are_not_square_are_used_as_stored(tmp_path):
    file = tmp_path / "wide.mp4"
    write_video(file, numbered_frames(3), sample_aspect_ratio=Fraction(2, 1))
    with av.open(str(file)) as container:
        assert container.streams.video[0].sample_aspect_ratio == 2
    assert [frame.size for frame in read_clip(file, 3)] == [(88, 48)] * 3


@pytest.mark.parametrize(("degrees", "flipped"), [(0, False), (90, False), (180, False), (270, False), (0, True)])
def test_videos_are_turned_as_they_say(degrees, flipped):
    """Matrices as written by FFmpeg, built by hand because not every version of PyAV can write them."""
    angle = np.deg2rad(degrees)
    a, b, c, d = (round(value * 2**16) for value in (np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)))
    if flipped:
        a, b = -a, -b
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(3).reshape(2, 3, 3)

    class SideData(bytes):
        type = av.sidedata.sidedata.Type.DISPLAYMATRIX

    matrix = SideData(np.array([a, b, 0, c, d, 0, 0, 0, 2**30], np.int32).tobytes())
    # A pixel (x, y) goes to (ax + cy, bx + dy).
    turned = np.asarray(video_decoding._upright(Image.fromarray(pixels), [matrix]))[..., 0]
    expected = np.rot90(pixels[..., 0], -degrees // 90)
    np.testing.assert_array_equal(turned, expected[:, ::-1] if flipped else expected)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_there_are_fewer_frames_than_packets(codec, tmp_path):
    """The recording starts between two key frames, and nothing before the second one can be decoded."""
    file = tmp_path / "recording.ts"
    write_video(file, numbered_frames(40), codec=codec, gop_size=10)
    content, packet = file.read_bytes(), 188
    file.write_bytes(content[len(content) // 5 // packet * packet :])
    assert video_decoding._read_packets({"bytes": None, "path": str(file)}, "It", video_decoding.MOST_PIXELS).count > 30
    assert [number_in(frame) for frame in frames_at(file, 0, 1, -1)] == [10, 11, 39]


def with_cover(file: Path, codec: str) -> None:
    """Writes an MP4 with video or sound, followed by a cover."""
    with av.open(str(file), "w") as container:
        if codec == "aac":
            stream = container.add_stream(codec, rate=8000)
            frames = [av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")]
            frames[0].sample_rate = 8000
        else:
            stream = container.add_stream(codec, rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 88, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(pixels, format="rgb24") for pixels in numbered_frames(12)]
        cover = container.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 200, 200, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((200, 200, 3), 90, np.uint8), format="rgb24")))
        container.mux(cover.encode())
        container.mux(stream.encode())


@pytest.mark.parametrize("suffix", ["mkv", "webm", "ts"])
def test_other_containers_are_read_up_to_a_cut(suffix, tmp_path):
    file = tmp_path / f"video.{suffix}"
    write_video(file, numbered_frames(60), **CODECS[suffix])
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    found = [number_in(frame) for frame in read_clip(file, 8)]
    assert found == uniform_frames(count_frames(file), 8)
    assert 8 < count_frames(file) < 60


def test_sound_and_a_cover_beside_the_video(tmp_path):
    write_video(tmp_path / "sound.mp4", numbered_frames(12), sound=True)
    with_cover(tmp_path / "cover.mp4", "libx264")
    for name in ("sound", "cover"):
        assert [number_in(frame) for frame in frames_at(tmp_path / f"{name}.mp4", 0, 11)] == [0, 11]


def test_a_video_whose_frames_change_their_size():
    file = io.BytesIO()
    for height in (32, 48):
        part = io.BytesIO()
        write_video(part, numbered_frames(4, height), format="mpegts")
        file.write(part.getvalue())
    sizes = [frame.size for frame in frames_at(file.getvalue(), *range(8))]
    assert sizes == [(88, 32)] * 4 + [(88, 48)] * 4


# Videos that are wrong


def sound_alone(file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def without_frames(file: Path) -> None:
    with av.open(str(file), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()


def cut(file: Path) -> None:
    """Writes an MP4 without its index, which comes after the frames."""
    write_video(file, numbered_frames(50, 64, 64))
    file.write_bytes(file.read_bytes()[:-1500])


def overwritten(file: Path) -> None:
    noise = np.random.default_rng(0)
    write_video(file, [noise.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(30)])
    content = bytearray(file.read_bytes())
    content[2000:-4000] = noise.bytes(len(content) - 6000)
    file.write_bytes(content)


def of_type(code: bytes) -> Callable[[Path], None]:
    """Writes an MP4 whose frames claim to be in another format."""

    def write(file: Path) -> None:
        write_video(file, numbered_frames(5))
        file.write_bytes(file.read_bytes().replace(b"avc1", code))

    return write


def playlist(file: Path) -> None:
    write_video(file.with_name("secret.ts"), numbered_frames(3))
    file.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.ts\n#EXT-X-ENDLIST\n")


def list_of_files(file: Path) -> None:
    write_video(file.with_name("other.mp4"), numbered_frames(3))
    file.write_text("ffconcat version 1.0\nfile other.mp4\n")


WRONG = {
    "empty": (lambda file: file.touch(), "is empty"),
    "missing": (lambda file: None, "cannot be read: No such file or directory"),
    "a folder": (lambda file: file.mkdir(), "cannot be read: Is a directory"),
    "text": (lambda file: file.write_text("hello " * 100), "cannot be read: Invalid data"),
    "noise": (lambda file: file.write_bytes(np.random.default_rng(0).bytes(20000)), "cannot be read: Invalid data"),
    "sound alone": (sound_alone, "has no video stream: it contains audio"),
    "a cover": (lambda file: with_cover(file, "aac"), "has no video stream: its only picture is a cover image"),
    "no frames": (without_frames, "has no frames"),
    "cut off": (cut, "cannot be read: Invalid data"),
    "overwritten": (overwritten, "cannot be read: "),
    "an unknown format": (of_type(b"qzqz"), "is in a format that FFmpeg cannot decode, or encrypted"),
    "encrypted": (of_type(b"encv"), "is in a format that FFmpeg cannot decode, or encrypted"),
    "a playlist": (playlist, "cannot be read: "),
    "a list of files": (list_of_files, "cannot be read: "),
    "a web page": (lambda file: file.write_text("<!doctype html><html></html>"), "cannot be read: Invalid data"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_video_is_named_in_one_line(kind, tmp_path):
    write, message = WRONG[kind]
    file = tmp_path / "video.mp4"
    write(file)
    with pytest.raises(VideoError) as raised:
        read_clip(file, 8)
    assert str(raised.value).startswith(f"The video '{file}' ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ImageError)


@pytest.mark.parametrize("stored", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}])
def test_nothing_stored(stored):
    with pytest.raises(VideoError, match=r"^Row 3 (has neither bytes nor a path|is empty)"):
        decode_frames(stored, lambda count: [[0]], lambda frame: frame, "Row 3")


@pytest.mark.parametrize("name", ["concat:a.mp4|b.mp4", "http://127.0.0.1:9/a.mp4", "file:video.mp4", "-", "pipe:0"])
def test_a_name_is_a_file_and_nothing_else(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.mp4", numbered_frames(3))
    with pytest.raises(VideoError, match="No such file or directory"):
        read_clip(name, 2)


def test_frames_that_are_too_large_are_not_decoded(tmp_path, monkeypatch):
    write_video(tmp_path / "video.mp4", numbered_frames(3))
    monkeypatch.setattr(video_decoding, "MOST_PIXELS", 2000)
    with pytest.raises(VideoError, match=r"has frames of 88 x 48 pixels: at most 2,000 are read"):
        read_clip(tmp_path / "video.mp4", 2)


def test_pyav_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ValueError, match=r"PyAV, which is not installed: pip install av\."):
        read_clip(tmp_path / "video.mp4", 2)


# Real files


FRAMES = {
    "av1_video.mkv": (125, (640, 360)),
    "grid_s1_bbaf2n.mpg": (75, (360, 288)),
    "h265_video.mp4": (10, (128, 128)),
    "nasa_13013.mp4": (390, (480, 270)),
    "utd_mhad_a5_s4_t4_color.avi": (34, (640, 480)),
    "edge_cases/grid_s1_lgbf8n_broken_first_frames.mpg": (75, (360, 288)),
    "edge_cases/rotated_90.mov": (3, (320, 568)),
    "edge_cases/unordered.mov": (4, (50, 50)),
}


@pytest.mark.parametrize("name", FRAMES)
def test_real_videos(name, shared):
    file = shared / "data" / "video_samples" / name
    count, size = FRAMES[name]
    assert count_frames(file) == count
    clip = read_clip(file, 8)
    assert {frame.size for frame in clip} == {size}
    with av.open(str(file)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.best("video"))]
    turned = [np.rot90(expected[i], -1) if "rotated" in name else expected[i] for i in uniform_frames(count, 8)]
    for frame, pixels in zip(clip, turned, strict=True):
        np.testing.assert_array_equal(np.asarray(frame), pixels)


def test_a_real_damaged_video(shared, tmp_path):
    file = shutil.copy(shared / "data" / "video_samples" / "edge_cases" / "corrupted.mp4", tmp_path)
    with pytest.raises(VideoError, match=r"cannot be read: Invalid data found when processing input$"):
        read_clip(file, 8)
