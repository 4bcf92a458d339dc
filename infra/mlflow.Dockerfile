# Tracking server: the official image lacks the drivers for Postgres and S3. Build in infra/:
#   docker build -f mlflow.Dockerfile -t occstream-mlflow:0.2.0 .
FROM python:3.11.14-slim-bookworm
COPY mlflow.lock /tmp/mlflow.lock
RUN pip install --no-cache-dir --no-deps --require-hashes -r /tmp/mlflow.lock \
    && rm /tmp/mlflow.lock \
    && useradd --create-home --uid 10001 mlflow
USER 10001
WORKDIR /home/mlflow
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000"]
