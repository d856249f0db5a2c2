// Runs a deployed network without Python: float32 samples from the standard input, outputs to the standard output.
//
//     serve network.so network.pt2 WIDTH [DEVICE] < samples > outputs

#include <dlfcn.h>

#include <cstdint>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <ATen/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int count, char** arguments) {
    if (count < 4) {
        std::cerr << "usage: serve LIBRARY PACKAGE WIDTH [DEVICE]\n";
        return 2;
    }
    // before the package: it looks for the operator that the library defines
    if (!dlopen(std::filesystem::absolute(arguments[1]).c_str(), RTLD_NOW)) {
        std::cerr << dlerror() << "\n";
        return 1;
    }
    try {
        c10::InferenceMode inference;
        torch::inductor::AOTIModelPackageLoader network(arguments[2]);
        const int64_t width = std::stoll(arguments[3]);
        std::vector<char> bytes{std::istreambuf_iterator<char>(std::cin), {}};
        const int64_t batch = bytes.size() / (width * sizeof(float));
        at::Tensor x = at::from_blob(bytes.data(), {batch, width}, at::kFloat).to(count > 4 ? arguments[4] : "cpu");
        at::Tensor y = network.run({x}).front().cpu().contiguous();
        std::cout.write(static_cast<const char*>(y.const_data_ptr()), y.nbytes());
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
