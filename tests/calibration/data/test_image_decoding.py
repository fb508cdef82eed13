"""Image decoding: every file becomes 8-bit RGB over one background in bounded memory, or is skipped by its name."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw

from calibration.data.image_decoding import MOST_PIXELS, Range, Unusable, decode, range_of
from calibration.data.image_folder import Folder
from calibration.data.preprocess import pixels
from models.spec import Preprocess
from tests.support.tiny import ROOT

PLAIN = Preprocess(size=8, crop=1.0)
RED = (200, 20, 30)


def no_range() -> Range:
    raise AssertionError("only images of more than 8 bits have a range")


def seen(path: Path, background: tuple[int, int, int] = (255, 255, 255)) -> npt.NDArray[np.uint8]:
    """Return the decoded image in `path`, uint8 (8, 8, 3)."""
    found = pixels(decode(path, no_range), Preprocess(size=8, crop=1.0, background=background))
    return found.transpose(1, 2, 0)


# --- Transparency ---------------------------------------------------------------------------------------------------


def icon(mode: str) -> Image.Image:
    """Return a black square whose shape, the left half, is only in the alpha channel."""
    alpha = Image.new("L", (8, 8), 0)
    ImageDraw.Draw(alpha).rectangle((0, 0, 3, 7), fill=255)
    if mode in ("RGBA", "LA"):
        image = Image.new(mode, (8, 8), 0)
        image.putalpha(alpha)
        return image
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0] * 2)
    image.paste(1, (4, 0, 8, 8))
    return image


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "webp")])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_a_shape_in_the_alpha_channel_alone_is_seen(
    tmp_path: Path, mode: str, suffix: str, background: tuple[int, int, int]
) -> None:
    options: dict[str, Any] = {"transparency": 1} if mode == "P" else {}
    options |= {"lossless": True} if suffix == "webp" else {}
    icon(mode).save(tmp_path / f"x.{suffix}", **options)
    found = seen(tmp_path / f"x.{suffix}", background)
    assert (found[:, :4] == 0).all()
    assert (found[:, 4:] == background).all()


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_one_colour_may_be_transparent(tmp_path: Path, mode: str) -> None:
    """PNG's tRNS and GIF's transparent index."""
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 4, 8))
    image = image.convert(mode)
    key = image.getpixel((0, 0))
    image.save(tmp_path / "x.png", transparency=key)
    found = seen(tmp_path / "x.png", RED)
    assert (found[:, :4] == RED).all() and (found[:, 4:] == 255).all()


def test_half_transparent_pixels_are_mixed(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "x.png")
    assert np.abs(seen(tmp_path / "x.png").astype(int) - 127).max() <= 1


def test_hidden_colours_do_not_bleed_into_visible_pixels(tmp_path: Path) -> None:
    """Resizing colours and alpha apart would mix the red of transparent pixels into the edge."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 64))
    image.save(tmp_path / "x.png")
    assert (seen(tmp_path / "x.png") == 255).all()


def test_each_background_has_a_different_key() -> None:
    from pipeline.store.store import plain

    assert plain(Preprocess(size=8)) != plain(Preprocess(size=8, background=(0, 0, 0)))


# --- More than 8 bits -----------------------------------------------------------------------------------------------


def test_radiometric_pictures_keep_their_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(29388, 29529, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(ramp).save(tmp_path / name / f"{index}.{'png' if index % 2 else 'tiff'}")
    folder = Folder.scan(tmp_path, seed=0)
    for index in range(4):
        image = folder.image("train", index)
        assert image is not None
        found = np.asarray(image)[..., 0]
        expected = (ramp.astype(float) - 29388) * 255 / (29529 - 29388)
        assert np.abs(found - expected).max() <= 1
    assert folder.decoding() == {"range": [29388, 29529]}


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_integers_and_floats_of_32_bits_are_read(tmp_path: Path, kind: type) -> None:
    ramp: npt.NDArray[Any] = np.linspace(-100, 300, 64).reshape(8, 8).astype(kind)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.fromarray(ramp).save(tmp_path / name / f"{index}.tif")
    image = Folder.scan(tmp_path, seed=0).image("test", 0)
    assert image is not None
    assert np.abs(np.asarray(image)[..., 0] - (ramp + 100) * 255 / 400.0).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 65535]], np.uint16), (0, 65535)),
        (np.array([[3000, 60000]], np.uint16), (0, 65535)),  # photographs
        (np.array([[0, 4095]], np.uint16), (0, 4095)),  # 12 bits
        (np.array([[7, 7]], np.uint16), (7, 8)),
        (np.array([[0.0, 1.0, np.nan, np.inf]], np.float32), (0, 1)),
        (np.array([[np.nan]], np.float32), (0, 65535)),
    ],
)
def test_the_range_of_a_data_set(values: npt.NDArray[Any], expected: tuple[float, float]) -> None:
    found = range_of([values, values])
    assert (found.low, found.high) == expected


def test_a_dead_pixel_does_not_set_the_range() -> None:
    values = np.full(100_000, 29400, np.uint16)
    values[::2] = 29500
    values[:50] = 0
    values[50:90] = 65535
    found = range_of([values])
    assert (found.low, found.high) == (29400, 29500)
    assert found.levels(np.array([0, 29400, 29450, 29500, 65535], np.uint16)).tolist() == [0, 0, 127, 255, 255]


def test_the_whole_range_is_the_upper_byte() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(Range(low=0, high=65535).levels(every), (every // 257).astype(np.uint8))


# --- Formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("x.bmp", "RGB"),
        ("x.dib", "RGB"),
        ("x.tif", "RGB"),
        ("x.TIFF", "CMYK"),
        ("x.jpg", "CMYK"),
        ("x.gif", "P"),
        ("x.ppm", "RGB"),
        ("x.pgm", "L"),
        ("x.pbm", "1"),
        ("x.jfif", "RGB"),
        ("x.webp", "RGB"),
        ("x.png", "P"),
        ("x.bmp", "1"),
    ],
)
def test_formats_and_modes(tmp_path: Path, name: str, mode: str) -> None:
    colour = (255, 255, 255) if mode in ("1", "L") else (200, 40, 60)
    image = Image.new("RGB", (16, 16), colour).convert(mode)
    image.save(tmp_path / name, format="JPEG" if name == "x.jfif" else None)
    assert np.abs(seen(tmp_path / name).astype(int) - colour).max() <= (20 if mode == "P" else 6)


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    for name in ("x.gif", "x.png", "x.webp", "x.tif"):
        options: dict[str, Any] = {"lossless": True} if "webp" in name else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (seen(tmp_path / name) == RED).all(), name


def test_the_format_is_read_from_the_content_and_not_from_the_name(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), RED).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert (seen(tmp_path / "x.jpg") == RED).all()


def test_formats_that_run_programs_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(Unusable, match=r"^not an image in any of the formats BMP, "):
        decode(tmp_path / "x.png", no_range)


def encoded() -> dict[str, bytes]:
    """Return a small image in several formats and modes, as bytes."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    found = {}
    for kind, mode in (
        *(("PNG", mode) for mode in ("RGBA", "P", "1", "I;16")),
        *(("TIFF", mode) for mode in ("RGB", "I;16", "F")),
        *(("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGBA"), ("PPM", "RGB")),
    ):
        if mode == "I;16":
            image = Image.fromarray(colours[..., 0].astype(np.uint16) * 200)
        else:
            image = Image.fromarray(colours).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode)
        file = io.BytesIO()
        image.save(file, kind)
        found[f"{kind} {mode}"] = file.getvalue()
    return found


def damaged(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8])):
        place = rng.randrange(len(changed)) if rng.random() < 0.5 else rng.randrange(min(60, len(changed)))
        match rng.randrange(4):
            case 0:
                changed[place] = rng.randrange(256)
            case 1:
                del changed[max(1, place) :]
            case 2:
                changed[place:place] = rng.randbytes(4)
            case _:
                changed[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\1\0\0"])
    return bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", encoded())
def test_a_damaged_file_is_a_picture_or_unusable(tmp_path: Path, kind: str) -> None:
    rng, data, path = random.Random(kind), encoded()[kind], tmp_path / "x"  # noqa: S311 - damage, not a secret
    for _ in range(40):
        path.write_bytes(damaged(data, rng))
        try:
            found = pixels(decode(path, lambda: Range(low=0, high=65535)), PLAIN)
        except Unusable as error:
            assert str(error)
        else:
            assert found.shape == (3, 8, 8)


# --- Bounds ---------------------------------------------------------------------------------------------------------


def bomb(path: Path, width: int, height: int, bits: int = 1) -> Path:
    """Write a grey PNG of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + -(-width * bits // 8))
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((20000, 1), "20000 x 1 pixels: more than 100 times as long as wide"),
        ((1, 20000), "1 x 20000 pixels: more than 100 times as long as wide"),
        ((13000, 13000), "13000 x 13000 pixels: more than 64 million"),
        ((60000, 60000), "DecompressionBombError"),
    ],
)
def test_too_large_or_thin_images_are_rejected_by_their_header(
    tmp_path: Path, size: tuple[int, int], sentence: str
) -> None:
    path = bomb(tmp_path / "x.png", *size) if max(size) < 60000 else bomb(tmp_path / "x.png", 8, 8)
    if max(size) >= 60000:
        data = bytearray(path.read_bytes())
        data[16:24] = struct.pack(">II", *size)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        path.write_bytes(data)
    with pytest.raises(Unusable, match=sentence):
        decode(path, no_range)


MEMORY = """
import resource, sys
from pathlib import Path
from calibration.data.batches import Images
from calibration.data.image_folder import Folder
from models.errors import BadRequest
from models.spec import Preprocess
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), int(sys.argv[2])))
folder = Folder.scan(Path(sys.argv[1]), seed=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    seen = [batch.shape for part in ("train", "val", "test")
            for batch, _ in Images(data=folder, part=part, preprocess=Preprocess(size=224)).batches(8)]
    print("read", sum(shape[0] for shape in seen))
except BadRequest as error:
    print("refused", error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def memory(root: Path) -> tuple[str, float]:
    """Return the result of reading every image in `root` at 224 pixels, and its memory in MB, at most 3 GB."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(root), str(3 * 2**30)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    said, taken = result.stdout.splitlines()
    return said, float(taken)


@pytest.mark.parametrize(
    ("size", "bits", "most_mb", "said"),
    [
        ((20000, 1), 8, 100, "refused"),
        ((20000, 200), 8, 300, "read 8"),
        ((13000, 13000), 1, 100, "refused"),
        ((7900, 7900), 1, 700, "read 8"),
    ],
)
def test_memory_is_bounded_for_every_image_shape(
    tmp_path: Path, size: tuple[int, int], bits: int, most_mb: float, said: str
) -> None:
    first = bomb(tmp_path / "x.png", *size, bits=bits)
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            (tmp_path / "data" / name / f"{index}.png").symlink_to(first)
    found, taken = memory(tmp_path / "data")
    assert found.startswith(said)
    assert taken < most_mb


def test_a_large_photograph_is_reduced_while_it_is_decoded(tmp_path: Path) -> None:
    """The result equals that of the same image at a tenth of its side."""
    small = Image.effect_noise((600, 400), 60).convert("RGB").resize((600, 400))
    small.putpixel((0, 0), RED)
    large = small.resize((6000, 4000), Image.Resampling.BICUBIC)
    large.save(tmp_path / "x.jpg", quality=95)
    large.save(tmp_path / "x.png", compress_level=1)
    preprocess = Preprocess(size=64, crop=0.875)
    expected = pixels(large, preprocess).astype(int)
    for name in ("x.jpg", "x.png"):
        image = decode(tmp_path / name, no_range)
        assert image.width * image.height <= 16_000_000 < large.width * large.height <= MOST_PIXELS
        assert np.abs(pixels(image, preprocess) - expected).mean() < 2
