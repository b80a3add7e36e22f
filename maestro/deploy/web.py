"""Addresses of exports on servers, and which redirects are followed."""

import os
import re
import urllib.parse
import urllib.request

from maestro.deploy.directory import ArtifactError


class RemoteError(ArtifactError):
  """A server does not send an export, or not as it is asked to."""


def parse_hub(url: str) -> tuple[str, str, str, str]:
  """hf://org/name[@revision][/folder]: (host, org/name, revision, folder)."""
  name = r"[\w][\w.-]*"
  found = re.fullmatch(
    rf"hf://({name}/{name})(?:@({name}))?((?:/{name})*)", url
  )
  if not found:
    raise RemoteError(
      f"{url} is no hf://org/name[@revision][/folder]; of a revision with"
      " slashes, give the commit"
    )
  host = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
  try:
    parts = urllib.parse.urlsplit(host)
    known = parts.scheme in ("http", "https") and bool(parts.hostname)
  except ValueError:
    known = False
  if not known:
    raise RemoteError(
      f"HF_ENDPOINT is {host!r}; set it to an https:// or http:// URL"
    )
  repository, revision, folder = found.groups()
  return host.rstrip("/"), repository, revision or "main", folder.strip("/")


def opener(redirects: "Redirects") -> urllib.request.OpenerDirector:
  """Opens http and https, by proxies where they are set, and nothing else."""
  made, proxies = urllib.request.OpenerDirector(), urllib.request.getproxies()
  for handler in (
    urllib.request.ProxyHandler(
      {k: v for k, v in proxies.items() if k in ("http", "https")}
    ),
    urllib.request.UnknownHandler(),
    urllib.request.HTTPHandler(),
    urllib.request.HTTPSHandler(),
    urllib.request.HTTPDefaultErrorHandler(),
    urllib.request.HTTPErrorProcessor(),
    redirects,
  ):
    made.add_handler(handler)
  return made


class Redirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects on one host; of hubs, to their stores as well."""

  max_redirections = 5

  def __init__(self, anywhere: bool):
    self._anywhere = anywhere

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    """See urllib; raises RemoteError of one that is not followed."""
    old, new = map(urllib.parse.urlsplit, (req.full_url, newurl))
    known = new.scheme in ("http", "https")
    if not known or (old.scheme == "https" and new.scheme == "http"):
      raise RemoteError(
        f"{req.full_url} redirects from {old.scheme} to {new.scheme}, which is"
        " not followed"
      )
    upgraded = old.hostname == new.hostname and not (old.port or new.port)
    if not (self._anywhere or old.netloc == new.netloc or upgraded):
      raise RemoteError(
        f"{req.full_url} redirects to another host, {new.netloc}; if you trust"
        " it, give its own URL"
      )
    return super().redirect_request(req, fp, code, msg, headers, newurl)
