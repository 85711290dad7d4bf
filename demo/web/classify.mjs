// From pixels to a label, for a folder that scripts/export.py wrote. Runs in browsers and in Node.

/** Opens a model. `folder` is where config.json lies; `read` gets a file's bytes, by default over HTTP. */
export async function openClassifier(ort, folder, read = fetchBytes) {
  const readJson = async (name) => JSON.parse(new TextDecoder().decode(await read(`${folder}/${name}`)));
  const [config, preprocessing, bytes] = await Promise.all([
    readJson("config.json"),
    readJson("preprocessor_config.json"),
    read(`${folder}/onnx/model.onnx`),
  ]);
  return { ort, config, preprocessing, session: await ort.InferenceSession.create(bytes) };
}

async function fetchBytes(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

/** RGBA pixels, resized and cropped to the model's size already, as normalised pixel values: red, green, blue. */
export function toPixelValues(rgba, { rescale_factor, image_mean, image_std }) {
  const count = rgba.length / 4;
  const values = new Float32Array(3 * count);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < count; i++) {
      values[channel * count + i] = (rgba[4 * i + channel] * rescale_factor - image_mean[channel]) / image_std[channel];
    }
  }
  return values;
}

/** The labels with their probabilities, the likeliest first, and the ids of the tokens that each stage kept. */
export async function classify({ ort, config, preprocessing, session }, rgba) {
  const { height, width } = preprocessing.crop_size;
  const pixels = new ort.Tensor("float32", toPixelValues(rgba, preprocessing), [1, 3, height, width]);
  const outputs = await session.run({ pixel_values: pixels });
  const logits = Array.from(outputs.logits.data);
  const largest = Math.max(...logits);
  const exponentials = logits.map((logit) => Math.exp(logit - largest));
  const total = exponentials.reduce((sum, value) => sum + value, 0);
  const labels = logits.map((logit, i) => ({ label: config.id2label[i], logit, score: exponentials[i] / total }));
  const keptTokens = session.outputNames.slice(1).map((name) => Array.from(outputs[name].data, Number));
  return { labels: labels.sort((a, b) => b.score - a.score), keptTokens };
}
