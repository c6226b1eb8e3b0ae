#include "primitive.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace flash {

namespace {

// Copies the elements of a strided array to where they follow one another.
void gather(const mx::array& from, mx::array& to) {
  size_t item = from.itemsize(), dims = from.ndim();
  const char* source = from.data<char>();
  char* target = to.data<char>();
  size_t inner = dims && from.strides().back() == 1 ? from.shape().back() : 1;
  size_t outer = dims - (inner > 1);
  std::vector<int64_t> at(dims, 0);
  for (size_t done = 0; done < from.size(); done += inner, target += inner * item) {
    int64_t offset = 0;
    for (size_t d = 0; d < outer; d++) offset += at[d] * from.strides()[d];
    std::memcpy(target, source + offset * item, inner * item);
    for (size_t d = outer; d-- > 0 && ++at[d] == from.shape()[d];) at[d] = 0;
  }
}

class Kernel : public mx::Primitive {
 public:
  Kernel(mx::Stream stream, const char* name, Body body, std::vector<int> reuses,
         std::vector<int> strided)
      : mx::Primitive(stream),
        name_(name),
        body_(std::make_shared<Body>(std::move(body))),
        reuses_(std::move(reuses)),
        strided_(std::move(strided)) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    Arrays in, out;
    std::vector<std::pair<mx::array, int>> gathers;
    for (auto& array : inputs) {
      encoder.set_input_array(array);
      int i = static_cast<int>(in.size());
      bool as_is = array.flags().row_contiguous || array.size() == 0 ||
                   std::find(strided_.begin(), strided_.end(), i) != strided_.end();
      if (as_is) {
        in.push_back(mx::array::unsafe_weak_copy(array));
      } else {
        mx::array whole(array.shape(), array.dtype(), nullptr, {});
        whole.set_data(mx::allocator::malloc(array.nbytes()));
        gathers.emplace_back(mx::array::unsafe_weak_copy(array), i);
        in.push_back(mx::array::unsafe_weak_copy(whole));
        encoder.add_temporary(std::move(whole));
      }
    }
    // Every output has a list of the inputs. Those of the others, which nobody reads any more,
    // would keep an input from being donated.
    for (auto& output : outputs) {
      if (&output.inputs() != &inputs && !output.is_tracer()) output.inputs().clear();
    }
    std::vector<int> copies(outputs.size(), -1);
    for (size_t i = 0; i < outputs.size(); i++) {
      int source = reuses_[i];
      if (source >= 0 && inputs[source].is_donatable() && inputs[source].flags().row_contiguous &&
          inputs[source].nbytes() == outputs[i].nbytes()) {
        outputs[i].copy_shared_buffer(inputs[source]);
      } else {
        outputs[i].set_data(mx::allocator::malloc(outputs[i].nbytes()));
        copies[i] = source;
      }
      encoder.set_output_array(outputs[i]);
      out.push_back(mx::array::unsafe_weak_copy(outputs[i]));
    }
    // This primitive may be gone when the lambda runs: it holds what it needs, never `this`.
    encoder.dispatch([body = body_, in = std::move(in), out = std::move(out),
                      copies = std::move(copies), gathers = std::move(gathers)]() mutable {
      for (auto& [array, i] : gathers) gather(array, in[i]);
      for (size_t i = 0; i < out.size(); i++) {
        if (copies[i] >= 0 && out[i].nbytes()) {
          std::memcpy(out[i].data<char>(), in[copies[i]].data<char>(), out[i].nbytes());
        }
      }
      (*body)(in, out);
    });
  }

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name_) + " runs on the CPU stream only.");
  }

  const char* name() const override { return name_; }

 private:
  const char* name_;
  std::shared_ptr<Body> body_;
  std::vector<int> reuses_;
  std::vector<int> strided_;
};

}  // namespace

Arrays on_cpu(const char* name, Body body, Arrays inputs, std::vector<Output> outputs,
              std::vector<int> strided) {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  std::vector<int> reuses;
  for (auto& output : outputs) {
    shapes.push_back(std::move(output.shape));
    dtypes.push_back(output.dtype);
    reuses.push_back(output.reuses);
  }
  auto kernel = std::make_shared<Kernel>(mx::default_stream(mx::Device::cpu), name, std::move(body),
                                         std::move(reuses), std::move(strided));
  return mx::array::make_arrays(std::move(shapes), dtypes, kernel, inputs);
}

Float float_type(mx::Dtype dtype) {
  if (dtype == mx::float32) return Float::f32;
  if (dtype == mx::float16) return Float::f16;
  if (dtype == mx::bfloat16) return Float::bf16;
  throw std::invalid_argument("The native kernels take float32, float16 and bfloat16.");
}

}  // namespace flash
