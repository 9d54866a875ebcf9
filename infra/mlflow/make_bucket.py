"""Make the bucket of MLFLOW_ARTIFACTS_DESTINATION where there is none; waits for the store."""

import os
import sys
import time
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def main() -> int:
    bucket = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).netloc
    store = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    for _ in range(30):
        try:
            if bucket not in {known["Name"] for known in store.list_buckets()["Buckets"]}:
                store.create_bucket(Bucket=bucket)
            return 0
        except (BotoCoreError, ClientError) as error:
            last = error
            time.sleep(2)
    print(f"{bucket}: cannot be made: {last}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
