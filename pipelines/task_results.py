"""Fetch the results of Ray tasks, with errors as the tasks raised them."""

from typing import Any

import ray

from pipelines.errors import USER_ERRORS


def fetched(reference: ray.ObjectRef[Any]) -> Any:
    """What a task returned. A user error is raised as the task raised it, without Ray's traceback around it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, USER_ERRORS):
            raise error.cause from error
        raise
