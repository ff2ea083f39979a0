"""The HTTP API: routes under `/hyper-merge` of whatever FastAPI app is around us."""
