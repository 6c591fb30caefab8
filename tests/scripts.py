"""The scripts that a user calls, as modules."""

import pipelines.curriculum
import pipelines.etl
import pipelines.evaluate
import pipelines.export
import pipelines.predict
import pipelines.registry
import pipelines.report
import pipelines.submission
import pipelines.sweep

MODULES = (
    pipelines.curriculum,
    pipelines.etl,
    pipelines.evaluate,
    pipelines.export,
    pipelines.predict,
    pipelines.registry,
    pipelines.report,
    pipelines.submission,
    pipelines.sweep,
)
