"""Damaged, misshapen and other files under the name of a checkpoint are refused as what they are."""

import gzip
import io
import random
import struct
import tracemalloc
import zipfile

import pytest
import torch
from torch.serialization import set_crc32_options

from kvjax.artifacts.files import HashedFile
from kvjax.errors import InputError
from tests.helpers.checkpoint_files import (
    PLAIN,
    STATE,
    envelope,
    expected_params,
    opens_as_plain,
    params_of,
    parse,
    rezipped,
    same,
    saved,
)

# Damaged bytes


def test_random_damage():
    """No file with flipped, zeroed, cut or lost bytes is read as other parameters."""
    whole = saved(envelope(metrics={"validation_iid": {"loss": 0.5}}))
    rng, refused = random.Random(1), 0
    for _ in range(100):
        content, at = bytearray(whole), rng.randrange(len(whole))
        kind, size = rng.choice(["flip", "zero", "cut", "lose"]), rng.randrange(1, 4096)
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "zero":
            content[at : at + size] = bytes(len(content[at : at + size]))
        elif kind == "cut":
            del content[at:]
        else:
            del content[at : at + size]
        try:
            assert same(params_of(parse(bytes(content))), PLAIN), (kind, at, size)
        except InputError as error:
            refused += 1
            assert str(error).startswith("step.pt: expected ") and "\n" not in str(error)
    assert refused > 70


def test_damaged_record_by_name():
    """One flipped bit of a tensor is refused by the record's name, even in a record that no weight needs."""
    whole = saved(envelope(optimizer_state={"state": {0: {"exp_avg": torch.full((7,), 1.25)}}, "param_groups": []}))
    at = whole.index(struct.pack("<f", 1.25) * 7)
    content = bytearray(whole)
    content[at] ^= 1
    with pytest.raises(InputError, match=r"damaged file \(record archive/data/\d+ does not match its CRC-32\)"):
        parse(bytes(content))


def test_two_records_of_one_name():
    """A file with two records of one name is refused: PyTorch reads the first, other tools the last."""
    buffer = io.BytesIO(saved(envelope()))
    with zipfile.ZipFile(buffer, "a") as out, pytest.warns(UserWarning, match="Duplicate name"):
        out.writestr("archive/data/0", bytes(STATE["token_embedding.weight"].nbytes))
    with pytest.raises(InputError, match="several records of one name"):
        parse(buffer.getvalue())


def test_file_saved_without_checksums():
    """A file that torch saved without checksums opens, with a note that nothing vouches for it."""
    set_crc32_options(False)
    try:
        content = saved(envelope())
    finally:
        set_crc32_options(True)
    assert any("nothing vouches" in note for note in opens_as_plain(content).notes)


@pytest.mark.parametrize("cut", [1, 5000, 60_000])
def test_old_format(cut):
    """A file of the format before zip opens with a note that nothing vouches for it, and a truncated one is refused."""
    content = saved(envelope(), _use_new_zipfile_serialization=False)
    assert any("nothing vouches" in note for note in opens_as_plain(content).notes)
    for damaged in (content[:-cut], content + b"x" * cut):
        with pytest.raises(InputError, match="a damaged file"):
            parse(damaged)


def test_old_format_with_a_huge_memo():
    """A damaged memo index of gigabytes is refused before memory is reserved for it."""
    content = saved(envelope(), _use_new_zipfile_serialization=False)
    at = next(
        at for at in range(400, len(content)) if content[at : at + 1] == b"r" and content[at + 2 : at + 5] == b"\1\0\0"
    )
    with pytest.raises(InputError, match="a shorter memo"):
        parse(content[: at + 4] + b"\x70" + content[at + 5 :])


# Memory


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_memory_of_misshapen_tensors(compression):
    """A view far larger than its storage, and a record that nothing reads, take no memory; the shape is refused."""
    huge = torch.zeros(1, dtype=torch.float16).expand(20_000, 20_000)
    content = saved(envelope(model_state=STATE | {"final_norm.bias": huge}))
    content = rezipped(content, compression=compression, **{"data/unused": bytes(40 << 20)})
    tracemalloc.start()
    with pytest.raises(InputError, match=r"final_norm.bias of shape \[24\]; found \[20000, 20000\]"):
        params_of(parse(content))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_views():
    """Transposed, strided and expanded views are read as the tensors they are."""
    wide = torch.zeros(24, 80)
    wide[:, ::2] = STATE["blocks.0.ff.fc_out.weight"]
    views = {
        "blocks.0.attn.q_proj.weight": STATE["blocks.0.attn.q_proj.weight"].T.contiguous().T,
        "blocks.0.ff.fc_out.weight": wide[:, ::2],
        "final_norm.weight": torch.full((1,), 0.5).expand(24),
    }
    found = params_of(parse(saved(envelope(model_state=STATE | views))))
    assert same(found, expected_params(STATE | {"final_norm.weight": torch.full((24,), 0.5)}))


def test_archive_of_another_tool():
    """An archive that was unpacked and compressed again holds the same parameters."""
    opens_as_plain(rezipped(saved(envelope()), compression=zipfile.ZIP_DEFLATED))


# What is no checkpoint


def zip_of(**records):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, record in records.items():
            out.writestr(name.replace("__", "/"), record)
    return buffer.getvalue()


def torchscript():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a Git LFS pointer .*git lfs pull",
        ),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
        (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32","shape":[1]}}' + bytes(50), "a safetensors file"),
        (gzip.compress(saved(envelope())), "a gzip file"),
        (b'{"step": 250}', "a JSON file"),
        (b"not a checkpoint", "a file of another kind, or damage"),
        (bytes(1000), "a file of another kind, or damage"),
        (zip_of(a=b"1", b=b"2"), r"a zip archive of other files \(a, b\)"),
        (zip_of(**{"arr_0.npy": b"1"}), "a zip archive of NumPy arrays"),
        (zip_of(a__constants__pkl=b"", **{"a/constants.pkl": b"", "a/data.pkl": b""}), "a TorchScript archive"),
    ],
)
def test_other_files_under_the_name(content, found):
    """A file that torch.save did not write is named as what it is, with the remedy, and never with torch's advice."""
    with pytest.raises(
        InputError, match=f"step.pt: expected a checkpoint written by torch.save; found {found}"
    ) as caught:
        parse(content)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    """A directory, a dangling link and a missing file are named as what they are."""
    (tmp_path / "step.pt").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    for name, found in (
        ("step", "a directory"),
        ("link", "a link to .*gone.pt, which does not"),
        ("gone", "no such file"),
    ):
        with pytest.raises(InputError, match=rf"{name}.pt: expected a PyTorch checkpoint; found {found}"):
            HashedFile.read(tmp_path / f"{name}.pt", "a PyTorch checkpoint")
