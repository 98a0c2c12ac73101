"""`hfkd push FOLDER REPO_ID`: share a saved run on the Hub, for instance when the push at its end failed."""

from pathlib import Path

from hfkd.errors import InputError
from hfkd.hub.publish import check_target, push_folder

from .parser import Parser


def run(argv: list[str]) -> int:
    parser = Parser("push", __doc__)
    parser.add_argument("folder", type=Path, help="folder of a saved run, with config.json")
    parser.add_argument("repo_id", help="NAME or NAMESPACE/NAME on the Hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="create the repo as a private one")
    parser.add_argument("--revision", help="branch to push to, created if it does not exist (default: main)")
    parser.add_argument("--commit_message", default="Upload with hfkd")
    arguments = parser.parse_args(argv)
    # Before anything is sent or created.
    if not (arguments.folder / "config.json").is_file():
        raise InputError(f"{arguments.folder} holds no config.json: give the folder of a saved run")
    repo_id = check_target(arguments.repo_id, private=arguments.private)
    commit = push_folder(
        arguments.folder,
        repo_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
    )
    print(commit.commit_url)
    return 0
