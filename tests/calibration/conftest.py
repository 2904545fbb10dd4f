from tests.calibration.toy import flow_pipeline, vp_pipeline  # noqa: F401
