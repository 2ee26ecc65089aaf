# docs/image.md says what is in the image, how it is built, and how the base is renewed.
# Its digest is that of the list of all platforms. Debian 13: glibc 2.41, supported until 2028.
ARG BASE=python:3.11.17-slim-trixie@sha256:45037981b62b34b44602584fccbc4d884d5f7dc92c7ee86bb38a698a79fe1e51
FROM ${BASE} AS builder
WORKDIR /src
# cpu or cuda. cuda is gigabytes larger.
ARG TORCH=cpu
# Any index or mirror that has the CPU build: the locks have its hashes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# serve-ray for an image that runs on Ray Serve (docs/kubernetes.md).
ARG LOCK=serve
COPY deploy/image/ deploy/image/
COPY requirements/ requirements/
# The heavy layer first: it changes only with the locks.
RUN deploy/image/install.sh libraries /opt/venv
COPY pyproject.toml README.md LICENSE ./
COPY models/ models/
COPY service/ service/
COPY psim/ psim/
RUN deploy/image/install.sh gateway /opt/venv \
    && /opt/venv/bin/python deploy/image/sbom.py > /opt/sbom.cdx.json

FROM ${BASE}
# No installer in what runs, and none that could bring it back. A volume that is mounted at /audit takes over
# its owner.
RUN python3 -m pip uninstall --yes --quiet --root-user-action=ignore pip setuptools wheel \
    && rm -rf /usr/local/bin/pip* /usr/local/lib/python3.11/ensurepip \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin psim \
    && install --directory --owner=psim --mode=0700 /audit
COPY --from=builder /opt/venv /opt/venv
COPY --from=builder /src/LICENSE /opt/sbom.cdx.json /usr/share/doc/psim-gateway/
ARG REVISION=unknown
LABEL org.opencontainers.image.title="PSIM Gateway" \
      org.opencontainers.image.description="Stops backdoor triggers before they reach a text classifier" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.revision="$REVISION"
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
