#!/bin/bash
# MLflow's server on a database: private on loopback, with passwords wherever another machine can reach it.
#   MLFLOW_BACKEND_STORE_URI      postgresql+psycopg2://... of runs and metrics
#   MLFLOW_ARTIFACTS_DESTINATION  s3://bucket or a folder
#   MLFLOW_HOST, MLFLOW_PORT      127.0.0.1 and 5000
# Beyond loopback also: MLFLOW_AUTH_ADMIN_PASSWORD, MLFLOW_FLASK_SERVER_SECRET_KEY, MLFLOW_SERVER_ALLOWED_HOSTS.
set -euo pipefail

host="${MLFLOW_HOST:-127.0.0.1}"
words=(
    mlflow server --host "$host" --port "${MLFLOW_PORT:-5000}" --workers 1
    --backend-store-uri "${MLFLOW_BACKEND_STORE_URI:?must be a database}"
    --artifacts-destination "${MLFLOW_ARTIFACTS_DESTINATION:?must be a bucket or a folder}"
)
if [ "$host" != 127.0.0.1 ]; then
    : "${MLFLOW_AUTH_ADMIN_PASSWORD:?must be set: the server can be reached from other machines}"
    : "${MLFLOW_FLASK_SERVER_SECRET_KEY:?must be set: it signs the sessions}"
    MLFLOW_AUTH_CONFIG_PATH="$(mktemp)"
    export MLFLOW_AUTH_CONFIG_PATH
    # A % of a URL would be a reference in this file.
    cat > "$MLFLOW_AUTH_CONFIG_PATH" << END
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = ${MLFLOW_BACKEND_STORE_URI//%/%%}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
END
    words+=(--app-name basic-auth)
fi
exec "${words[@]}"
