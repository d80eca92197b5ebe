"""What a command writes lies below its output folder; what data sets name lies below theirs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from encoded import encoded, parquet

from deme_cli.data.images import open_images
from deme_cli.errors import ArtifactError, MissingError

ROOT = Path(__file__).parents[2]
# Every name that the process opens for writing, makes, moves, links or removes.
WATCH = """
import json, os, sys

seen = open({log!r}, "a")
CHANGES = {{
    "os.mkdir": [0], "os.rename": [0, 1], "os.remove": [0], "os.rmdir": [0], "os.link": [0, 1],
    "os.symlink": [1], "os.truncate": [0], "os.chmod": [0], "os.chown": [0], "os.utime": [0],
    "shutil.rmtree": [0], "shutil.move": [0, 1],
}}

def tell(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        paths = [path] if writes and not isinstance(path, int) else []
    elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"):
        paths = [f"!{{event}} {{arguments[0]!r}}"]
    else:
        paths = [arguments[index] for index in CHANGES.get(event, [])]
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            name = os.fsdecode(path)
            place = name if name.startswith("!") else os.path.realpath(name)
            seen.write(json.dumps([event, place]) + "\\n")
    if paths:
        seen.flush()

sys.addaudithook(tell)
"""


COMMANDS = {
    "merge": ["merge", "ft_1of4.safetensors", "ft_2of4.safetensors", "-o", "out/m.safetensors"],
    "inspect": ["inspect", "--verify", "base.safetensors"],
    "sample": ["sample", "base.safetensors", "-n", "2", "--steps", "2", "-o", "out/s.safetensors"],
    "finetune": [
        "finetune", "--range", "1/4", "--steps", "2", "-b", "2", "--data", "digits",
        "--held-out", "0", "-o", "out/f.safetensors", "--force",
    ],
    "analyze": ["analyze", "losses", "base.safetensors", "--data", "digits", "--num", "2",
                "--buckets", "2", "-o", "out/l.json"],
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "merge" else [pytest.mark.slow]) for name in COMMANDS],
)
def test_a_command_writes_below_its_output_the_cache_and_temp(
    name: str, run_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By its own account to Python's audit hooks."""
    place = tmp_path_factory.mktemp("outside")
    log, folders = place / "seen.jsonl", [place / "home", place / "scratch", place / "watch"]
    for folder in folders:
        folder.mkdir()
    (place / "watch" / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    environment = {
        **os.environ, "PYTHONPATH": f"{place / 'watch'}{os.pathsep}{ROOT}", "HOME": str(folders[0]),
        "TMPDIR": str(folders[1]), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folders[0] / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "deme_cli", *COMMANDS[name]], cwd=run_folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # matplotlib, diffusers and torch keep caches in the home folder and work in temp
    allowed = (run_folder / "out", *folders[:2])
    for event, touched in map(json.loads, log.read_text().splitlines()):
        inside = any(Path(touched).is_relative_to(folder.resolve()) for folder in allowed)
        # torch looks for its libraries, matplotlib for the system's fonts
        reads = touched.endswith(("/ldconfig'", "'fc-list'"))
        assert inside or reads or touched == os.devnull, (event, touched)
    assert (name == "inspect") == (not (run_folder / "out").exists())


def test_links_that_go_in_a_circle_are_told_or_replaced(run_folder: Path, deme: Callable) -> None:
    for name in ("loop", "m.safetensors"):
        (run_folder / name).symlink_to(name)
    model = run_folder / "base.safetensors"
    for output in ("loop/s.safetensors", "loop/pictures"):
        result = deme("sample", model, "-n", 1, "--steps", 1, "-o", output)
        assert isinstance(result.exception, MissingError), result.exception
    assert deme("merge", *COMMANDS["merge"][1:3], "-o", "m.safetensors").exit_code == 0
    assert not (run_folder / "m.safetensors").is_symlink()


# Data sets that name what lies outside of them


def png(level: int = 9) -> bytes:
    return encoded(np.full((8, 8), level, np.uint8))


def add(shard: tarfile.TarFile, name: str, data: bytes = b"", **changes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in changes.items():
        setattr(member, key, value)
    shard.addfile(member, io.BytesIO(data))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder three levels down, in which nothing may appear but the cache of `datasets`."""
    place = tmp_path / "a" / "b" / "work"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return place


def all_files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if "cache" not in p.parts}


def test_names_and_links_in_a_shard_lead_nowhere(home: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(200))
    evil = Path(f"/tmp/deme-evil-{os.getpid()}.png")
    with tarfile.open(home / "shard.tar", "w") as shard:
        for index, name in enumerate(("../../evil.png", str(evil), "./x/../../../evil.png")):
            add(shard, name, png(index))
    before = all_files(tmp_path)
    images = open_images("shard.tar", shape=(1, 8, 8), split="all")
    assert len(images) == 3  # read into memory; their names are labels, not places
    assert all_files(tmp_path) == before
    assert not evil.exists()
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(home / f"{kind.hex()}.tar", "w") as shard:
            add(shard, "a.png", png(7))
            add(shard, "b.png", type=kind, linkname=str(tmp_path / "secret.png"))
        with suppress(ArtifactError):
            images = open_images(f"{kind.hex()}.tar", shape=(1, 8, 8), split="all")
            assert 200 not in images.batch(range(len(images))).flatten().tolist()


def write_rows(path: Path, named: str) -> None:
    """A table of an image, and of a row that names a file instead."""
    rows = [{"bytes": png(7), "path": "a.png"}, {"bytes": None, "path": named}]
    path.write_bytes(parquet(image=rows))


def test_rows_of_a_table_read_only_files_that_datasets_fetched(home: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(200))
    (tmp_path / "cache" / "downloads").mkdir(parents=True)
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "secret.png")
    for named in ("{out}/secret.png", "../../../secret.png", "{out}/cache/link"):
        write_rows(home / "rows.parquet", named.format(out=tmp_path))
        with pytest.raises(ArtifactError, match=r"rows.parquet: row 1 names a file, .* with|give"):
            open_images("rows.parquet", shape=(1, 8, 8), split="all")
    fetched = tmp_path / "cache" / "downloads" / "0123"  # as a hub's folder of images comes
    fetched.write_bytes(png(200))
    write_rows(home / "good.parquet", str(fetched))
    images = open_images("good.parquet", shape=(1, 8, 8), split="all")
    assert images.batch([0, 1])[:, 0, 0, 0].tolist() == [7, 200]


def test_metadata_names_only_images_of_its_folder(home: Path, tmp_path: Path) -> None:
    folder = home / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(200))
    (folder / "a.png").write_bytes(png(7))
    rows = [
        {"file_name": "a.png", "text": "x"},
        {"file_name": "../../../../secret.png", "text": "y"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ArtifactError, match="name images that are not there"):
        open_images("images", shape=(1, 8, 8), split="all", wants="text")


@pytest.mark.parametrize(
    ("name", "value", "file"),
    [
        ("vae", ["evil", "AutoencoderKL"], "vae/evil.py"),
        ("vae", ["transformers", "AutoModel"], None),
        ("extra", [["evil"], "Evil"], None),
        ("_class_name", ["evil", "Evil"], "evil.py"),
        ("_class_name", "StableDiffusionPipeline", "None.py"),
    ],
)  # fmt: skip
def test_code_beside_a_pipeline_is_not_run(
    pipelines: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deme: Callable,
    name: str, value: object, file: str | None,
) -> None:  # fmt: skip
    folder, mark = tmp_path / "pipeline", tmp_path / "ran"
    shutil.copytree(pipelines("sd"), folder)
    monkeypatch.chdir(tmp_path)
    if name == "vae":  # also where it changes after the import
        assert deme("split", folder, "-n", "2", "--data", "digits").exit_code == 0
    if file:
        (folder / file).write_text(f"open({str(mark)!r}, 'w')\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: value}))
    commands = [["split", folder, "-n", "2", "--data", "digits", "--force"]]
    if name == "vae":
        drawn = ["sample", "base.safetensors", "-n", "1", "--steps", "1", "--prompt", "x"]
        commands += [drawn, ["split", pipelines("sd"), "--pipeline", folder, "--force"]]
    for words in commands:
        error = deme(*words).exception
        assert isinstance(error, ArtifactError), error
        assert f"model_index.json: {name} = " in str(error)
        assert "\n" not in str(error)
    assert not mark.exists()
