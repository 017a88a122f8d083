# recall-worker as an image: Debian's own Python, the program in its own venv, an account without
# rights, no build tools.
#   docker build -t recall-worker .
# Give secrets as files: RECALL_DSN_FILE, RECALL_RUN_TOKEN_FILE, RECALL_SIGNING_SECRET_FILE. It runs
# with a read-only root.
#
# Everything that is installed by pip is locked and hashed: release/locks/. The base is given by
# its tag here, so that each build has Debian's fixes; a release is built on the digest that the tag
# has at that time (python -m release). To do the same:
#   docker build --build-arg BASE=debian:bookworm-slim@sha256:… -t recall-worker .
# What is in the image: /usr/share/sbom/recall-worker.cdx.json.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 python3-venv ca-certificates
WORKDIR /src
# The venv has no pip; the pip of another venv installs into it.
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/recall-worker
COPY release/locks release/locks
RUN /tools/bin/pip install --no-cache-dir --require-hashes --no-deps \
        --only-binary :all: -r release/locks/build.txt \
    && /tools/bin/pip --python /opt/recall-worker/bin/python install --no-cache-dir --no-compile \
        --require-hashes --no-deps --only-binary :all: -r release/locks/image.txt
COPY pyproject.toml README.md LICENSE ./
COPY release/recall-worker.cdx.json release/recall-worker.cdx.json
COPY recall_worker recall_worker
COPY sql sql
RUN /tools/bin/pip wheel --no-cache-dir --no-build-isolation --no-deps -w /wheel . \
    && /tools/bin/pip --python /opt/recall-worker/bin/python install --no-cache-dir --no-compile \
        --no-deps /wheel/*.whl \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/recall-worker/lib

FROM ${BASE} AS program
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 ca-certificates \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
COPY --from=build /opt/recall-worker /opt/recall-worker

FROM program AS bill
COPY release/sbom.py /sbom.py
RUN /opt/recall-worker/bin/python /sbom.py --image > /recall-worker.cdx.json

FROM program
COPY --from=bill /recall-worker.cdx.json /usr/share/sbom/recall-worker.cdx.json
ARG BASE
ARG VERSION=unreleased
ARG REVISION=unknown
LABEL org.opencontainers.image.title="recall-worker" \
    org.opencontainers.image.description="The daemon that keeps an AI agent's promises to come back" \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.source="https://github.com/recall-worker/recall-worker" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.base.name="${BASE}"
ENV PATH=/opt/recall-worker/bin:$PATH PYTHONUNBUFFERED=1 RECALL_OPS_LISTEN=127.0.0.1:9187
# 65532 has no special meaning; any other number works as well.
USER 65532:65532
# It asks /livez: a worker without PostgreSQL is still healthy.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python3", "-c", \
         "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9187/livez', timeout=4)"]
# SIGTERM drains: allow longer than RECALL_DRAIN_TIMEOUT before the kill (docker stop -t 60).
STOPSIGNAL SIGTERM
ENTRYPOINT ["recall-worker"]
CMD ["run"]
