# recall-worker as an image: Debian's own Python, the program in its own venv, an account without
# rights, no build tools.
#   docker build -t recall-worker .
# Give secrets as files: RECALL_DSN_FILE, RECALL_RUN_TOKEN_FILE, RECALL_SIGNING_SECRET_FILE. It runs
# with a read-only root.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 python3-venv ca-certificates
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY recall_worker recall_worker
COPY sql sql
# The venv has no pip; the pip of another venv installs into it.
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/recall-worker \
    && /tools/bin/pip --python /opt/recall-worker/bin/python install --no-cache-dir --no-compile . \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/recall-worker/lib

FROM ${BASE}
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 ca-certificates \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log
COPY --from=build /opt/recall-worker /opt/recall-worker
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
