"""One use case each: a request in, files and a result out, without a screen."""
