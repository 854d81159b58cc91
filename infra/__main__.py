"""The stack, as a table of contents: what is asked for, what is there, what follows from both."""

import pulumi

import access
import credentials
import network
import outputs
import server
import settings
import storage
import survey

config, mistakes = settings.read()
aws = access.provider(config)
found, refusals = survey.look(config, aws)
if mistakes or refusals:
    raise pulumi.RunError(settings.as_sentences(mistakes + refusals))
pulumi.log.info(survey.outlook(config, found))

here = pulumi.ResourceOptions(provider=aws)
net = network.build(config, found.zones, here)
buckets = storage.buckets(config, here)
volume = storage.data_volume(config, found, here)
secret = credentials.build(config, here)
profile = access.instance_profile(buckets, secret, here)
address = network.address(config, here)
machine = server.launch(config, found, net, buckets, volume, secret, profile, address, here)
outputs.export(config, found, machine, buckets, volume, secret, address)
