# syntax=docker/dockerfile:1
FROM python:3.11-slim-bookworm AS builder
WORKDIR /src
RUN python -m venv /opt/venv
COPY requirements/ requirements/
# The heavy layer first: it changes only with the locks. PyPI has the CUDA build of torch; for the CPU
# build, pass the address of an index that has it as --build-arg PIP_EXTRA_INDEX_URL.
ARG PIP_EXTRA_INDEX_URL
# serve-ray for an image that runs on Ray Serve (docs/kubernetes.md).
ARG LOCK=serve
RUN { /opt/venv/bin/pip install --no-cache-dir --require-hashes --no-deps \
        -r requirements/torch-cpu.txt \
        || /opt/venv/bin/pip install --no-cache-dir --require-hashes --no-deps \
        -r requirements/torch-cuda.txt; } \
    && /opt/venv/bin/pip install --no-cache-dir --require-hashes --no-deps \
        -r "requirements/$LOCK.txt" \
    && pip install --no-cache-dir --require-hashes --no-deps -r requirements/build.txt
COPY pyproject.toml README.md ./
COPY models/ models/
COPY service/ service/
COPY psim/ psim/
# What is served and its fastest engine: the offline half's libraries stay out of the image.
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist . \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps dist/*.whl \
    && /opt/venv/bin/pip check \
    && rm -rf /opt/venv/lib/python3.11/site-packages/models/offline

FROM python:3.11-slim-bookworm
# A volume that is mounted at /audit takes over its owner.
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin psim \
    && install --directory --owner=psim --mode=0700 /audit
COPY --from=builder /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    HF_HUB_OFFLINE=1 \
    PSIM_HOST=0.0.0.0 \
    PSIM_PORT=8000 \
    PSIM_BUNDLE=/bundle
USER 10001
# Empty, and of root: no code is imported from where somebody may write.
WORKDIR /srv
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
