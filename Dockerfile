# Farebox in a container: the lock with its hashes, no root, no compiler.
#
#   docker build -t farebox .
#   docker run --rm -p 127.0.0.1:8080:8080 farebox demo     to look at it: database and demo upstream inside
#   config/compose.yaml                                     to run it, with a PostgreSQL of its own

FROM python:3.13-slim AS build
RUN python -m venv /opt/farebox
WORKDIR /src
COPY requirements.lock ./
RUN /opt/farebox/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY proxy proxy
# The builder has just come from the lock: nothing is fetched here.
RUN /opt/farebox/bin/pip install --no-cache-dir --no-deps --no-build-isolation --no-index .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin farebox \
    && install -d -o farebox -g farebox -m 0700 /var/lib/farebox
COPY --from=build /opt/farebox /opt/farebox
COPY pricing.yaml config/upstreams.yaml /etc/farebox/
ENV PATH=/opt/farebox/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FAREBOX_HOST=0.0.0.0 \
    FAREBOX_METRICS_HOST=0.0.0.0 \
    FAREBOX_PRICING=/etc/farebox/pricing.yaml \
    FAREBOX_UPSTREAMS=/etc/farebox/upstreams.yaml \
    FAREBOX_STATE_DIR=/var/lib/farebox
WORKDIR /var/lib/farebox
USER farebox
VOLUME /var/lib/farebox
# Metrics are on 9464, for the containers beside this one: publish it to nobody else.
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + (os.environ.get('FAREBOX_PORT') or '8080') + '/healthz', timeout=2)"]
ENTRYPOINT ["farebox"]
CMD ["serve"]
