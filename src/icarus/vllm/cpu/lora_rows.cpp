// LoRA of many adapters on a CPU: adds each row's adapter, without a copy of the weights for each row.
//
// vLLM's CPU operators (vllm/lora/ops/torch_ops/lora_ops.py) copy A and B of an adapter for every row of a step, even for
// rows without an adapter. Here a step comes as runs of rows with one adapter (find_runs in lora_rows.py):
//
//     short run    one pass per row over A and B of its slot, float sums, no copies, all cores
//     long run     y[run] += (x[run] A^T) B^T, two products of matrices in the precision of the weights
//     no adapter   in no run: costs nothing
//
// A graph that torch.compile made keeps one tensor per layer, the first that vLLM passes. Its address identifies the
// layer here, because weights and runs change between steps and the compiled graph does not.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kTileOutputs = 128;        // outputs whose sums stay in registers
constexpr int64_t kMinThreadWork = 1 << 15;  // multiplications that are worth another thread
constexpr int64_t kMinMatrixRows = 32;       // a run with so many rows is multiplied as a matrix

struct Layer {
  std::vector<Tensor> a;                // per slice: (slots, 1, r, inputs), vLLM's memory; empty if A is applied outside
  std::vector<Tensor> b;                // per slice: (slots, r, outputs), copies; undefined while no adapter has weights
  std::vector<int64_t> columns;         // per slice: its first output
  std::vector<std::vector<char>> held;  // per slice and slot: whether the slot's adapter has weights there
  Tensor runs;                          // of the step, as find_runs in lora_rows.py writes them
  int64_t rank, inputs, outputs;
};

std::unordered_map<const void*, Layer> layers;
std::vector<Tensor> steps;  // the runs of all layers, each once

// Whether no row of the step has an adapter. It does not touch a layer, whose memory would not be in a cache by then.
bool idle() {
  return std::all_of(steps.begin(), steps.end(), [](const Tensor& runs) { return !*runs.const_data_ptr<int32_t>(); });
}

struct Row {
  int64_t row, slot;
};

template <typename X, typename W>
float dot(const X* x, const W* w, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(w[i]);
  return sum;
}

// y[0:size] += sum over r of shrunk[r] b[r, 0:size]
template <typename Y, typename W>
void expand(Y* y, const float* shrunk, const W* b, int64_t rank, int64_t stride, int64_t size) {
  float sums[kTileOutputs] = {0};
  for (int64_t r = 0; r < rank; ++r) {
    const W* w = b + r * stride;
    const float s = shrunk[r];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) sums[i] += s * static_cast<float>(w[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) y[i] = static_cast<Y>(static_cast<float>(y[i]) + sums[i]);
}

int64_t grain(int64_t multiplications) { return std::max<int64_t>(1, kMinThreadWork / std::max<int64_t>(1, multiplications)); }

// (rows, r) of one slice in float32: x A^T, or x itself if A is applied outside.
template <typename X, typename W>
std::vector<float> shrink(const Layer& layer, size_t slice, const Tensor& x, const std::vector<Row>& rows) {
  const int64_t rank = layer.rank, inputs = x.size(1), stride = x.stride(0);
  std::vector<float> shrunk(rows.size() * rank);
  const X* from = x.const_data_ptr<X>();
  const W* a = layer.a.empty() ? nullptr : layer.a[slice].const_data_ptr<W>();
  at::parallel_for(0, shrunk.size(), grain(a ? inputs : 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [row, slot] = rows[i / rank];
      const int64_t r = i % rank;
      const X* own = from + row * stride;
      shrunk[i] = a ? dot(own, a + (slot * rank + r) * inputs, inputs) : static_cast<float>(own[r]);
    }
  });
  return shrunk;
}

template <typename X, typename W>
void add_rows(const Layer& layer, const Tensor& y, const Tensor& x, const std::vector<Row>& rows) {
  for (size_t slice = 0; slice < layer.b.size(); ++slice) {
    std::vector<Row> own;
    for (const Row& row : rows)
      if (layer.held[slice][row.slot]) own.push_back(row);
    if (own.empty()) continue;
    const std::vector<float> shrunk = shrink<X, W>(layer, slice, x, own);
    const int64_t rank = layer.rank, outputs = layer.b[slice].size(2), stride = y.stride(0);
    const int64_t tiles = (outputs + kTileOutputs - 1) / kTileOutputs;
    const W* b = layer.b[slice].const_data_ptr<W>();
    X* to = y.mutable_data_ptr<X>() + layer.columns[slice];
    at::parallel_for(0, own.size() * tiles, grain(kTileOutputs * rank), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [row, slot] = own[i / tiles];
        const int64_t column = i % tiles * kTileOutputs;
        expand(to + row * stride + column, shrunk.data() + i / tiles * rank, b + slot * rank * outputs + column, rank,
               outputs, std::min(kTileOutputs, outputs - column));
      }
    });
  }
}

void add_long(const Layer& layer, const Tensor& y, const Tensor& x, int64_t slot) {
  for (size_t slice = 0; slice < layer.b.size(); ++slice) {
    if (!layer.held[slice][slot]) continue;
    const Tensor& b = layer.b[slice];
    const Tensor own = x.to(b.scalar_type());
    const Tensor shrunk = layer.a.empty() ? own : at::matmul(own, layer.a[slice][slot][0].t());
    Tensor part = y.narrow(1, layer.columns[slice], b.size(2));
    if (part.scalar_type() == b.scalar_type())
      part.addmm_(shrunk, b[slot]);  // adding it later would write and read the product once more
    else
      part.add_(at::matmul(shrunk, b[slot]));
  }
}

bool touched(const Layer& layer, const int32_t* runs) {
  for (const auto& slots : layer.held)
    for (int32_t i = 0; i < runs[0]; ++i)
      if (slots[runs[3 + 3 * i]]) return true;
  return false;
}

// y (rows, outputs of all slices) += x (rows, inputs) through each row's adapter. first identifies the layer.
void add_lora(Tensor& y, const Tensor& x, const Tensor& first) {
  if (idle()) return;
  const auto known = layers.find(first.const_data_ptr());
  if (known == layers.end()) return;
  const Layer& layer = known->second;
  const int32_t* runs = layer.runs.const_data_ptr<int32_t>();
  if (!touched(layer, runs)) return;
  TORCH_CHECK(y.dim() == 2 && x.dim() == 2 && y.stride(1) == 1 && x.size(0) >= y.size(0) &&
                  x.size(1) == layer.inputs && y.size(1) >= layer.outputs,
              "add_lora: y ", y.sizes(), " and x ", x.sizes(), " are not rows of a layer with ", layer.inputs,
              " inputs and ", layer.outputs, " outputs");
  const Tensor input = x.to(y.scalar_type()).contiguous();  // the types differ if a head is kept in float32
  std::vector<Row> rows;
  for (int32_t i = 0; i < runs[0]; ++i) {
    const int32_t* run = runs + 1 + 3 * i;
    const int64_t begin = run[0], end = std::min<int64_t>(run[1], y.size(0));
    if (end - begin >= kMinMatrixRows)
      add_long(layer, y.narrow(0, begin, end - begin), input.narrow(0, begin, end - begin), run[2]);
    else
      for (int64_t row = begin; row < end; ++row) rows.push_back({row, run[2]});
  }
  if (rows.empty()) return;
  const auto weights = layer.a.empty() ? first.scalar_type() : layer.a[0].scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "add_lora", [&] {
    using X = scalar_t;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weights, "add_lora", [&] {
      add_rows<X, scalar_t>(layer, y, input, rows);
    });
  });
}

// Takes in the weights of one slot of a layer; the first call registers the layer. a is empty for embeddings.
void set_weights(const std::vector<Tensor>& a, const std::vector<Tensor>& b, const Tensor& runs, int64_t slot) {
  const c10::InferenceMode off(false);  // tensors that are made in inference mode cannot be written outside of it
  Layer& layer = layers[(a.empty() ? b : a)[0].const_data_ptr()];
  if (layer.b.empty()) {
    for (const Tensor& part : a) TORCH_CHECK(part.is_contiguous(), "set_weights: A of a layer must be contiguous");
    const int64_t rank = b[0].size(3);
    layer = {a, std::vector<Tensor>(b.size()), {}, {}, runs, rank, a.empty() ? rank : a[0].size(3), 0};
    for (const Tensor& part : b) {
      layer.columns.push_back(layer.outputs);
      layer.held.emplace_back(part.size(0), 0);
      layer.outputs += part.size(2);
    }
    if (std::none_of(steps.begin(), steps.end(), [&](const Tensor& known) { return known.is_same(runs); }))
      steps.push_back(runs);
  }
  for (size_t slice = 0; slice < b.size(); ++slice) {
    const Tensor own = b[slice][slot][0];
    if (!(layer.held[slice][slot] = own.any().item<bool>())) continue;
    if (!layer.b[slice].defined())
      layer.b[slice] = at::zeros({b[slice].size(0), layer.rank, own.size(0)}, own.options());
    layer.b[slice][slot].copy_(own.t());
  }
}

void forget(const Tensor& first) {
  layers.erase(first.const_data_ptr());
  std::erase_if(steps, [](const Tensor& runs) {
    return std::none_of(layers.begin(), layers.end(), [&](const auto& layer) { return layer.second.runs.is_same(runs); });
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(icarus, library) {
  library.def("add_lora(Tensor(a!) y, Tensor x, Tensor first) -> ()");
  library.def("set_weights(Tensor[] a, Tensor[] b, Tensor runs, int slot) -> ()");
  library.def("forget(Tensor first) -> ()");
}

TORCH_LIBRARY_IMPL(icarus, CPU, library) {
  library.impl("add_lora", add_lora);
  library.impl("forget", forget);
}

TORCH_LIBRARY_IMPL(icarus, CompositeExplicitAutograd, library) { library.impl("set_weights", set_weights); }

TORCH_LIBRARY_IMPL(icarus, Meta, library) {
  library.impl("add_lora", [](Tensor&, const Tensor&, const Tensor&) {});
}
