"""Folders of data that other programs wrote: which files hold the text, and which programs' files are not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from castalia.errors import DataError
from castalia.reading import keys, read_json

SHARD: Any = keys({"filename": str}, required=["filename"])
STATE = keys({"_data_files": list[SHARD]}, required=["_data_files"])  # of `save_to_disk`
INDEX = keys({"shards": list | None, "chunks": list | None})


def files_of_dataset(folder: Path) -> list[Path] | None:
    """The files of a folder that Hugging Face's `Dataset.save_to_disk` wrote, in the order of its rows; else None.

    What else lies there, such as the results of `map`, is not among them. Raises DataError for a folder of several
    splits, and for the folders of MosaicML's streaming and of litdata.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if not splits:
            raise DataError(f"{folder}: the splits of this dataset of Hugging Face are not there; get it again")
        one = "train" if "train" in splits else splits[0]
        raise DataError(
            f"{folder} holds the splits {', '.join(splits)} of a dataset of Hugging Face: name one, {folder}/{one}"
        )
    if (folder / "index.json").is_file():
        _refuse_index(folder)
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return None
    names = [entry["filename"] for entry in read_json(folder / "state.json", DataError, STATE)["_data_files"]]
    if not names:
        raise DataError(f"{folder}: this dataset of Hugging Face has no rows")
    if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
        raise DataError(f"{folder}: its state.json names {', '.join(missing[:3])}, which is not there")
    return [folder / name for name in names]


def _refuse_index(folder: Path) -> None:
    try:
        index = read_json(folder / "index.json", DataError, INDEX)
    except DataError:  # of another program: one file of JSON among others, which are left out
        return
    if index.get("shards") is not None:
        raise DataError(
            f"{folder} is a dataset of MosaicML's streaming (MDS), which is not read; write its text as JSON lines "
            "with that package: for row in StreamingDataset(local=FOLDER, shuffle=False)"
        )
    if index.get("chunks") is not None:
        raise DataError(
            f"{folder} is a dataset of litdata, which is not read; write its text as JSON lines with that package: for "
            "row in StreamingDataset(FOLDER)"
        )
