"""Serves the HTTP API: routes under `/hyper-merge`, for any FastAPI app."""
