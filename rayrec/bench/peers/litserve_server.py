"""The ranker behind LitServe, one worker: `python FILE BUNDLE STATE PORT BATCH`."""

import sys

import litserve
from ranker_of_bundle import RankerOfBundle

# By default a batch is what waits already, and a worker without work asks again and again: it holds a core, which on a
# machine of two is half of it. A millisecond of waiting lets it rest.
WAIT_S = 0.001


class Lists(litserve.LitAPI):
    """One list a request, ranked together with what else has come."""

    def setup(self, device):
        """Load, in the worker."""
        self.ranker = RankerOfBundle(BUNDLE, STATE)

    def decode_request(self, request):
        """Check the body."""
        return self.ranker.request(request)

    def batch(self, inputs):
        """The ranker takes a list."""
        return inputs

    def predict(self, batch):
        """Rank."""
        return self.ranker.answers(batch)

    def unbatch(self, output):
        """It gives one, too."""
        return output

    def encode_response(self, output):
        """As JSON."""
        return output


BUNDLE, STATE, PORT, BATCH = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

if __name__ == "__main__":
    api = Lists(max_batch_size=BATCH, batch_timeout=WAIT_S, api_path="/v1/recommend")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
