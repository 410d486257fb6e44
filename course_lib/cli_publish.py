"""`course publish`: a model or an adapter on a hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from course_lib.errors import InputError, did_you_mean

PLACES = ("hf", "modelscope", "openxlab")


def publish(
    place: Annotated[str, typer.Argument(help="hf (Hugging Face), modelscope or openxlab")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the folder of an adapter or of a merged model")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the files and their bytes; send nothing")] = False,
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    base: Annotated[
        str | None, typer.Option(help="the base's repository or name; default: the one the folder or its run names")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="the training's work dir, for the card; default: the folder that DIR stands in")
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(help="gradio or streamlit: a web app too, as a Space of the same name (hf), or beside it"),
    ] = None,
) -> None:
    """Publish a model with a card made from its run; prints the address. The same command again sends what changed."""
    from course_lib.export import publish as publishing
    from course_lib.export.secrets import check_no_secrets
    from course_lib.export.upload import plan_upload, with_app

    if place not in PLACES:
        raise InputError(
            f"{place!r} is no place to publish to: choose {', '.join(PLACES)}{did_you_mean(place, PLACES)}"
        )
    if place == "openxlab" and private:
        raise InputError("--private: OpenXLab asks for it on the page where the repository is made")
    upload = plan_upload(folder, repository, base=base, run=run, place=place)
    uploads = with_app(upload, app, repository, place) if app is not None else [(upload, None)]
    if dry_run:
        for planned, sdk in uploads:
            print(f"{'space' if sdk else 'model'} {repository} on {place}, {sum(planned.sizes().values()):,} bytes")
            for name, size in planned.sizes().items():
                print(f"{size:>15,}  {name}")
            if planned.left_out:
                print(f"left out: {', '.join(planned.left_out)}", file=sys.stderr)
            check_no_secrets(planned.files.items())
        return
    for planned, sdk in uploads:
        if place == "hf":
            print(publishing.publish_hub(planned, repository, private=private, sdk=sdk))
        elif place == "modelscope":
            print(publishing.publish_modelscope(planned, repository, private=private))
        else:
            print(publishing.publish_openxlab(planned, repository))
