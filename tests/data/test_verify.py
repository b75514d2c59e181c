"""Shards that were cut, swapped, flipped or made to do harm."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from made_up_slides import MemoryStore, make_slide

from cfusion.data.shard_index import read_index, tar_key
from cfusion.data.shards import ShardDataset
from cfusion.data.verify import verify_shards
from cfusion.errors import DataError
from preprocess.packing import pack_store


@pytest.fixture
def folder(tmp_path):
    pack_store(
        MemoryStore([make_slide(f"s{i}", cells=3, seed=i) for i in range(8)]), tmp_path / "d", target_bytes=30_000
    )
    return tmp_path / "d"


def overwrite(folder, sample, name, data, at=0):
    """Put `data` over a member's bytes, `at` bytes from its start."""
    index = read_index(folder)
    with (folder / index.shards[sample.shard].name).open("r+b") as stream:
        stream.seek(sample.members[name].offset + at)
        stream.write(data)


def edit_index(folder, change):
    path = folder / "index.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite_tar(folder, extra, content=b""):
    """Append an entry to the first shard, and make the index believe in the new length."""
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(extra, io.BytesIO(content))
    edit_index(folder, lambda value: value["shards"][0].update(size=path.stat().st_size))


def test_intact_shards_have_no_problems(folder):
    result = verify_shards(folder)
    assert result.problems == ()
    assert sorted(result.good) == [f"s{i}" for i in range(8)]


def test_long_and_odd_names_verify(tmp_path):
    names = ["a" * 180, "../up", "naïve ~ (1)%." * 12, "s"]
    pack_store(MemoryStore([make_slide(name) for name in names]), tmp_path)
    result = verify_shards(tmp_path)
    assert result.problems == ()
    assert sorted(result.good) == sorted(names)


def test_a_truncated_tar_is_refused_and_the_rest_is_listed(folder):
    index = read_index(folder)
    last = index.samples[-1]
    path = folder / index.shards[-1].name
    with path.open("r+b") as stream:
        stream.truncate(last.members["x10.npy"].offset + 10)
    named = rf"slide {last.slide_id}, member x10\.npy is the first beyond its end"
    with pytest.raises(DataError, match=rf"{path.name}: \d+ bytes, the index says \d+: truncated.*{named}.*verify"):
        ShardDataset.open(folder)
    result = verify_shards(folder)
    assert last.slide_id not in result.good
    assert {s.slide_id for s in index.samples if s.shard != last.shard} <= set(result.good)
    assert any(
        (p.slide_id, p.member) == (last.slide_id, "x10.npy") and "the shard ends after 10 of its" in p.what and p.remedy
        for p in result.problems
    )


def test_a_missing_tar_is_refused(folder):
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: the shard is missing"):
        ShardDataset.open(folder)
    assert {p.shard for p in verify_shards(folder).problems} == {"shard-000001.tar"}


def test_a_flipped_bit_is_named_by_slide_and_member(folder):
    sample = read_index(folder).samples[3]
    overwrite(folder, sample, "x20.npy", b"\x01", at=300)
    dataset = ShardDataset.open(folder)
    with pytest.raises(DataError, match=rf"slide {sample.slide_id}, member x20\.npy: its checksum"):
        dataset.read(sample.slide_id, ["x20"])
    result = verify_shards(folder)
    assert set(result.good) == set(dataset.slide_ids) - {sample.slide_id}
    assert (sample.slide_id, "x20.npy") in {(p.slide_id, p.member) for p in result.problems}


def test_the_index_of_another_tar_is_refused(folder, tmp_path):
    pack_store(
        MemoryStore([make_slide(f"s{i}", cells=3, seed=i + 50) for i in range(8)]), tmp_path / "e", target_bytes=30_000
    )
    shutil.copy(tmp_path / "e" / "index.json", folder)
    dataset = ShardDataset.open(folder)
    with pytest.raises(DataError, match=r"member x20\.npy: its checksum"):
        dataset.read("s0", ["x20"])
    assert verify_shards(folder).good == ()


def test_swapped_tars_are_reported(folder):
    first, second = folder / "shard-000000.tar", folder / "shard-000001.tar"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    index = read_index(folder)
    problems = verify_shards(folder).problems
    for number in (0, 1):
        own, other = (next(s.slide_id for s in index.samples if s.shard == n) for n in (number, 1 - number))
        assert any(p.slide_id == own and f"the tar has {other}.x20.npy in its place" in p.what for p in problems)


@pytest.mark.parametrize("name", ["../evil.x20.npy", "/etc/evil.x20.npy", "a/../../evil.npy", "..\\evil.npy"])
def test_an_entry_that_leads_out_of_the_folder_is_named(folder, name):
    rewrite_tar(folder, tarfile.TarInfo(name))
    problems = verify_shards(folder).problems
    assert any(
        p.member == name and "points outside the folder" in p.what and "never unpack" in p.remedy for p in problems
    )
    assert len(verify_shards(folder).good) == 8
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_an_entry_that_is_no_file_is_named(folder, kind):
    entry = tarfile.TarInfo("link.x20.npy")
    entry.type, entry.linkname = kind, "/etc/passwd"
    rewrite_tar(folder, entry)
    problems = verify_shards(folder).problems
    assert any(p.member.startswith("link") and "not a plain file" in p.what for p in problems)


def test_an_indexed_entry_turned_into_a_link_is_named(folder):
    sample = read_index(folder).samples[0]
    path = folder / "shard-000000.tar"
    with tarfile.open(path) as tar:
        entry = tar.getmember(f"{tar_key(sample.slide_id)}.x10.npy")
    header = entry.offset_data - 512
    entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with path.open("r+b") as stream:
        stream.seek(header)
        stream.write(entry.tobuf(tarfile.GNU_FORMAT))
    result = verify_shards(folder)
    assert sample.slide_id not in result.good
    assert any((p.slide_id, p.member) == (sample.slide_id, "x10.npy") for p in result.problems)


def sealed(header):
    """A tar header with the checksum of its content."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def negative_size(header):
    # Back to this very header: `tarfile` would read it for ever.
    return sealed(header[:124] + (-512).to_bytes(12, "big", signed=True) + header[136:])


def pax(header):
    return sealed(header[:156] + b"x" + header[157:])


@pytest.mark.parametrize("damage", [lambda h: h[:20] + b"\1" + h[21:], negative_size, pax, lambda _: bytes(512)])
def test_a_damaged_header_costs_only_its_own_slide(folder, damage):
    index = read_index(folder)
    mates = [s for s in index.samples if s.shard == 0]
    assert len(mates) > 1
    at = mates[0].members["x10.npy"].offset - 512
    with (folder / "shard-000000.tar").open("r+b") as stream:
        stream.seek(at)
        header = stream.read(512)
        stream.seek(at)
        stream.write(damage(header))
    result = verify_shards(folder)
    assert set(result.good) == {s.slide_id for s in index.samples} - {mates[0].slide_id}
    assert {(p.slide_id, p.member) for p in result.problems if p.slide_id} == {(mates[0].slide_id, "x10.npy")}


@pytest.mark.parametrize(
    "records", [b"30 size=notanumber\n", b"20 GNU.sparse.map=1,\n", b"99999999999 path=x\n", b"abc"]
)
def test_an_extended_header_of_nonsense_is_named(folder, records):
    entry = tarfile.TarInfo("extended.x20.npy")
    entry.type, entry.size = tarfile.XHDTYPE, len(records)
    rewrite_tar(folder, entry, records)
    result = verify_shards(folder)
    assert len(result.good) == 8
    assert any(p.member == entry.name and "not a plain file" in p.what for p in result.problems)


def test_names_from_a_tar_cannot_speak_to_the_terminal(folder):
    rewrite_tar(folder, tarfile.TarInfo("\x1b[2J\nwhole: s9.npy"))
    reported = [str(p) for p in verify_shards(folder).problems]
    assert any(r"\x1b[2J\nwhole: s9.npy" in line for line in reported)
    assert all(line.isprintable() for line in reported)


def test_an_index_that_claims_more_than_memory_can_hold_is_refused(folder):
    def claim(value):
        value["shards"][0]["size"] = 10**16
        members = value["samples"][0]["members"]
        for name, (width, itemsize) in {"x20": (8, 2), "coords_x20": (2, 4), "parent_x20": (1, 4)}.items():
            member = members[f"{name}.npy"]
            member.update(shape=[10**12, *member["shape"][1:]], size=128 + 10**12 * width * itemsize)

    edit_index(folder, claim)
    index = read_index(folder)
    result = verify_shards(folder)
    assert {s.slide_id for s in index.samples if s.shard != 0} <= set(result.good)
    assert any((p.slide_id, p.member) == (index.samples[0].slide_id, "x20.npy") for p in result.problems)
    with pytest.raises(DataError, match="the index says 10000000000000000"):
        ShardDataset.open(folder)


@pytest.mark.parametrize("change", [lambda m: m.pop("x10.npy"), lambda m: m["x10.npy"].update(shape=[24, 4])])
def test_a_slide_that_contradicts_the_index_costs_only_itself(folder, change):
    edit_index(folder, lambda value: change(value["samples"][2]["members"]))
    slide_id = json.loads((folder / "index.json").read_text())["samples"][2]["slide_id"]
    with pytest.raises(DataError, match=rf"index\.json: slide {slide_id}, member x10\.npy: is .*preprocess verify"):
        ShardDataset.open(folder)
    result = verify_shards(folder)
    assert sorted([*result.good, slide_id]) == [f"s{i}" for i in range(8)]
    assert any((p.slide_id, p.member) == (slide_id, "x10.npy") and "in the index" in p.what for p in result.problems)


def npy_header(text):
    """An .npy header of 128 bytes, as in the shards, that claims `text`."""
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{'descr': '<f2', 'fortran_order': False, 'shape': (10000000000, 8), }", "its header claims"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (48, 8), }", "unpickling"),
        ("{'descr': '<f2', 'fortran_order': True, 'shape': (48, 8), }", "Fortran"),
        ("__import__('os').system('touch evil')", "not an .npy file"),
        ("{'descr': '<f2', 'fortran_order': False, 'shape': (48, 8)", "not an .npy file"),
    ],
)
def test_a_header_that_lies_is_refused_even_with_the_right_checksum(folder, claim, message):
    import zlib

    sample = read_index(folder).samples[0]
    header = npy_header(claim)
    assert len(header) == sample.members["x20.npy"].header == 128
    overwrite(folder, sample, "x20.npy", header)
    path = folder / read_index(folder).shards[sample.shard].name
    member = sample.members["x20.npy"]
    data = path.read_bytes()[member.offset : member.offset + member.size]
    edit_index(folder, lambda v: v["samples"][0]["members"]["x20.npy"].update(crc32=zlib.crc32(data)))
    with pytest.raises(DataError, match=rf"slide {sample.slide_id}, member x20\.npy: .*{message}.*verify"):
        ShardDataset.open(folder).read(sample.slide_id, ["x20"])
    problems = verify_shards(folder).problems
    assert any(p.slide_id == sample.slide_id and p.member == "x20.npy" and message in p.what for p in problems)
    assert len(verify_shards(folder).good) == 7


def test_values_that_are_not_finite_are_named(folder):
    import zlib

    sample = read_index(folder).samples[0]
    overwrite(folder, sample, "x20.npy", np.array([np.nan], "<f2").tobytes(), at=128)
    member = sample.members["x20.npy"]
    data = (folder / "shard-000000.tar").read_bytes()[member.offset : member.offset + member.size]
    edit_index(folder, lambda v: v["samples"][0]["members"]["x20.npy"].update(crc32=zlib.crc32(data)))
    problems = verify_shards(folder).problems
    assert any("not finite" in p.what and p.slide_id == sample.slide_id and "Extract" in p.remedy for p in problems)


@pytest.mark.parametrize("name", ["../shard.tar", "/tmp/shard.tar", "a/b.tar", ".hidden.tar", "shard.tar\n", "x.zip"])
def test_an_index_that_names_a_path_is_refused(folder, name):
    edit_index(folder, lambda value: value["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"index\.json: shards\.0\.name: .*plain file name"):
        ShardDataset.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["samples"][0]["members"].pop("x10.npy"), r"slide \w+, member x10\.npy: is missing"),
        (lambda v: v["samples"][0]["members"]["x20.npy"].update(shape=[10**12, 8]), "cannot contain an array"),
        (lambda v: v["samples"][0]["members"]["x20.npy"].update(dtype="|O"), "dtype is one of"),
        (lambda v: v["samples"][0]["members"]["x20.npy"].update(offset=10**9), "ends beyond its shard"),
        (lambda v: v["samples"][0].update(shard=99), "lies in shard 99"),
        (lambda v: v["samples"][0]["tile_px_level0"].update(x20=0), r"tile_px_level0\.x20: .*greater than 0"),
        (lambda v: v["samples"].append(v["samples"][0]), "appears twice"),
        (lambda v: v.update(format="cfusion-shards-9"), "format"),
        (lambda v: v.update(extra=1), "extra"),
        (lambda v: v.update(dim=9), r"expected <f2 \(tiles, 9\)"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(folder, change, message):
    edit_index(folder, change)
    with pytest.raises(DataError, match=rf"index\.json.*{message}.*Pack the store again"):
        ShardDataset.open(folder)


def test_no_index_and_no_json_are_refused(folder):
    (folder / "index.json").write_text("[")
    with pytest.raises(DataError, match=r"index\.json.*[Ii]nvalid JSON"):
        ShardDataset.open(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json: cannot be read.*cfusion preprocess shard"):
        ShardDataset.open(folder)
