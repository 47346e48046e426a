from pathlib import Path

import pytest

from helpers.sample_images import encode, picture


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """36 images in nested folders and four formats, with files that are none."""
    root = tmp_path_factory.mktemp("folder")
    kinds = [(".jpg", "JPEG"), (".png", "PNG"), (".webp", "WEBP"), (".jpeg", "JPEG")]
    for number in range(36):
        extension, file_format = kinds[number % 4]
        path = root / "abc"[number % 3] / ("deep" if number % 2 else "") / f"{number:03}{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number), file_format))
    (root / "README.txt").write_text("no image")
    (root / ".hidden.jpg").write_bytes(b"resource fork")
    return root


@pytest.fixture(scope="session")
def broken_folder(tmp_path_factory) -> Path:
    """40 files of which 4 cannot be used, each for another reason."""
    root = tmp_path_factory.mktemp("broken")
    for number in range(40):
        data = encode(picture(number))
        if number == 3:
            data = data[:-60]
        elif number == 14:
            data = b"<html>404 Not Found</html>"
        elif number == 25:
            data = encode(picture(number, 8, 8))
        elif number == 36:
            data = b""
        (root / f"{number:03}.jpg").write_bytes(data)
    return root
